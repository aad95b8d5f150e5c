"""Of pictures that are the same, or look the same, the first stays."""

from __future__ import annotations

from ldm.ingest.perceptual import Lookalikes
from ldm.ingest.reasons import RefusedError
from ldm.ingest.rows import Row
from ldm.ingest.scratch import scratch_database, told

TABLES = """
CREATE TABLE contents (sha256 BLOB PRIMARY KEY, name TEXT) WITHOUT ROWID;
CREATE TABLE looks (number INTEGER PRIMARY KEY, name TEXT);
"""


class Kept:
    """The pictures kept so far, over all lists: a picture to train on is none to validate with.

    Content is that of the finished sample. Files with the same bytes give the same sample, and so
    do files that differ in a name, a date or the way they are packed, which a hash of the
    downloaded bytes would take for two.
    """

    def __init__(self, distance: int | None) -> None:
        self._db = scratch_database(TABLES)
        self._looks = None if distance is None else Lookalikes(distance)

    def add(self, row: Row, sha256: str, look: int | None) -> None:
        """Take in a picture by its sha256 and its perceptual hash, if that is asked for.

        Raises :class:`RefusedError` when an earlier one has the same content or looks like it.
        """
        content, name = bytes.fromhex(sha256), f"row {row.number} of {row.split}"
        with told():
            found = self._db.execute("SELECT name FROM contents WHERE sha256 = ?", [content])
            if same := found.fetchone():
                raise RefusedError("duplicate content", f"same picture as {same[0]}")
            if self._looks is not None and look is not None:
                self._add_look(name, look, self._looks)
            self._db.execute("INSERT INTO contents VALUES (?, ?)", (content, name))

    def _add_look(self, name: str, look: int, looks: Lookalikes) -> None:
        if found := looks.find(look):
            number, bits = found
            like = self._db.execute("SELECT name FROM looks WHERE number = ?", [number])
            raise RefusedError("near duplicate", f"{bits} of 64 bits from {like.fetchone()[0]}")
        number = looks.add(look)
        self._db.execute("INSERT INTO looks VALUES (?, ?)", (number, name))
