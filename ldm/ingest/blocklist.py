"""Pictures that must not become samples, by their hashes, one a line of a text file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.errors import UserError
from ldm.ingest.perceptual import Lookalikes
from ldm.ingest.reasons import RefusedError
from ldm.ingest.rows import SHA256

PERCEPTUAL = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Blocklist:
    """Hashes to refuse, and the lines that they stand on."""

    contents: Mapping[str, int] = field(default_factory=dict)
    """sha256 in hexadecimal to its line."""
    looks: Lookalikes | None = None
    look_lines: Sequence[int] = ()

    def refuse(self, contents: Sequence[str], look: int | None) -> None:
        """Raise :class:`RefusedError` if one of a picture's sha256, or its look, is listed."""
        for sha256 in contents:
            if sha256 in self.contents:
                raise RefusedError("blocked", f"line {self.contents[sha256]}: same content")
        found = None if self.looks is None or look is None else self.looks.find(look)
        if found:
            number, bits = found
            detail = f"line {self.look_lines[number]}: {bits} of 64 bits from it"
            raise RefusedError("blocked", detail)


def read_blocklist(path: Path, distance: int | None) -> Blocklist:
    """Read hashes in hexadecimal: 64 digits are a sha256, 16 a perceptual hash; # begins a comment.

    Raises :class:`UserError` when the file is missing or not UTF-8, a line is no hash, or is a
    perceptual one and there is no ``distance`` in bits for it.
    """
    looks = None if distance is None else Lookalikes(distance)
    contents: dict[str, int] = {}
    look_lines: list[int] = []
    for number, line in enumerate(_lines(path), start=1):
        value = line.partition("#")[0].strip().lower()
        if SHA256.fullmatch(value):
            contents.setdefault(value, number)
        elif PERCEPTUAL.fullmatch(value):
            if looks is None:
                raise UserError(
                    f"{path}: line {number} is a perceptual hash; set ingest.near_duplicates to "
                    "the bits in which a picture may differ from it"
                )
            looks.add(int(value, 16))
            look_lines.append(number)
        elif value:
            raise UserError(
                f"{path}: line {number} is no hash ({value[:80]!r}); write 64 hexadecimal digits "
                "of a sha256, or 16 of a perceptual hash"
            )
    return Blocklist(contents, looks, look_lines)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); mend ingest.blocked"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
