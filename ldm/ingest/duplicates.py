"""Of pictures that are the same, or look the same, the first stays."""

from __future__ import annotations

from ldm.ingest.perceptual import Lookalikes
from ldm.ingest.reasons import RefusedError
from ldm.ingest.rows import Row


class Kept:
    """The pictures kept so far, over all lists: a picture to train on is none to validate with.

    Content is that of the finished sample. Files with the same bytes give the same sample, and so
    do files that differ in a name, a date or the way they are packed, which a hash of the
    downloaded bytes would take for two.
    """

    def __init__(self, distance: int | None) -> None:
        self._contents: dict[str, Row] = {}
        self._rows: list[Row] = []
        self._looks = None if distance is None else Lookalikes(distance)

    def add(self, row: Row, sha256: str, look: int | None) -> None:
        """Take in a picture by its sha256 and its perceptual hash, if that is asked for.

        Raises :class:`RefusedError` when an earlier one has the same content or looks like it.
        """
        same = self._contents.get(sha256)
        if same:
            raise RefusedError("duplicate content", f"same picture as {_name(same)}")
        if self._looks is not None and look is not None:
            self._add_look(row, look, self._looks)
        self._contents[sha256] = row

    def _add_look(self, row: Row, look: int, looks: Lookalikes) -> None:
        found = looks.find(look)
        if found:
            number, bits = found
            detail = f"{bits} of 64 bits from {_name(self._rows[number])}"
            raise RefusedError("near duplicate", detail)
        looks.add(look)
        self._rows.append(row)


def _name(row: Row) -> str:
    return f"row {row.number} of {row.split}"
