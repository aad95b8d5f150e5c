"""Reading ``params.yaml``: one line that names file and key where it cannot be used.

Presets (:mod:`ldm.presets`) are params files of their own, holding only what differs from the
defaults of :mod:`ldm.config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ldm.config import Params, Section
from ldm.errors import UserError
from ldm.presets import presets

SectionKind = TypeVar("SectionKind", bound=Section)


def load_params(source: str, overrides: list[str]) -> Params:
    """Read a params file, or a preset by name, and apply ``section.key=value`` overrides.

    Values in overrides are YAML. Raises :class:`UserError` naming file and key.
    """
    path = _locate(source)
    values = _mapping(path)
    for override in overrides:
        _apply(values, override)
    return _validated(Params, values, str(path))


def load_section(kind: type[SectionKind], path: Path) -> SectionKind:
    """One section from a YAML file of its own. Raises :class:`UserError` naming file and key."""
    return _validated(kind, _mapping(path), str(path))


def with_changes(section: SectionKind, changes: dict[str, Any], where: str) -> SectionKind:
    """A copy of a section with other values, checked; ``where`` names their origin in errors."""
    return _validated(type(section), {**section.model_dump(), **changes}, where)


def _validated(kind: type[SectionKind], values: dict[str, Any], where: str) -> SectionKind:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(": ".join(filter(None, (where, key, _explain(first))))) from error


def _mapping(path: Path) -> dict[str, Any]:
    """What a YAML file maps to what; nothing if it is empty."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not YAML ({reason})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be lines of `key: value`, is a {type(values).__name__}")
    return values


def _locate(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if source in presets():
        return presets()[source]
    known = ", ".join(presets())
    raise UserError(f"{source}: no such params file, and no such preset (presets: {known})")


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--set {override}: must be section.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:  # An empty section.
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {parent} is not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key; check the spelling or remove it"
    message = error["msg"].removeprefix("Value error, ")
    message = f"{message[0].lower()}{message[1:]}"
    of_a_section = isinstance(error["input"], dict | Section)
    return message if of_a_section else f"{message} (is {error['input']!r})"
