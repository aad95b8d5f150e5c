"""What every section of the settings is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""As torch's and numpy's generators take it."""
Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["auto", "float32", "bfloat16"]
"""``auto``: bfloat16 where the hardware computes it, else float32."""


class Section(BaseModel):
    """Frozen, and no key it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _empty(cls, value: object, about: ValidationInfo) -> object:
        """YAML reads a section with nothing in it as null."""
        kind = cls.model_fields[about.field_name or ""].annotation
        is_section = isinstance(kind, type) and issubclass(kind, Section)
        return {} if value is None and is_section else value

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for manifests."""
        return self.model_dump(mode="json")


def expect_multiples(widths: tuple[int, ...], **parts: int) -> None:
    """ValueError where a network's width cannot be cut into parts of such a size or number."""
    for width in widths:
        for name, part in parts.items():
            if width % part:
                raise ValueError(f"width {width} is not a multiple of {name} {part}: change either")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings or metrics with dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def as_text(value: Any) -> str:
    """A setting's value: a string as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
