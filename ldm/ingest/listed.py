"""The rows of all lists, and what became of each: on disk, so that lists may outgrow the memory."""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ldm.config import Ingest
from ldm.ingest.reasons import RefusedError
from ldm.ingest.rows import Row, Skip, check
from ldm.ingest.scratch import scratch_database, told

TABLE = """
CREATE TABLE rows (
    id INTEGER PRIMARY KEY, split TEXT, number INTEGER, url TEXT, caption TEXT, rated TEXT,
    sha256 TEXT, key TEXT, asked INTEGER DEFAULT 0, reason TEXT DEFAULT '', detail TEXT DEFAULT '',
    UNIQUE (split, number)
);
CREATE INDEX by_key ON rows (key);
"""
"""In the order of the lists. A row without a ``reason`` is wanted; with one it is left out. What
has no ``key`` has no URL; ``asked``: 1 for what was not left out at once."""
FIELDS = "id, split, number, url, caption, rated, sha256, key"
PAGE = 1000
"""Rows at a time."""


class Listed:
    """Rows, each wanted or left out for a reason; what iterates over them reads them as it goes."""

    def __init__(self) -> None:
        self._db = scratch_database(TABLE)

    def take(self, rows: Iterable[Row], config: Ingest) -> None:
        """Take in a list's rows; leave out those that need not be asked for.

        Of rows with the same URL the first that is not left out for another reason stays.
        """
        for row in rows:
            self._insert(row)
            try:
                check(row, config)
                self._ask(row)
            except RefusedError as refusal:
                self.leave_out(row, refusal)

    def _insert(self, row: Row) -> None:
        columns = "split, number, url, caption, rated, sha256, key"
        values = row.split, row.number, row.url, row.caption, json.dumps(row.rated), row.sha256
        key = None if row.plain_url is None else row.key
        self._do(f"INSERT INTO rows ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", *values, key)

    def _ask(self, row: Row) -> None:
        """Mark it as to be asked for, unless a row before it is that has its key."""
        first = "SELECT number FROM rows WHERE key = ? AND split = ? AND asked"
        if found := self._do(first, row.key, row.split):
            raise RefusedError("duplicate", f"same url as row {found[0][0]}")
        self._do("UPDATE rows SET asked = 1 WHERE split = ? AND number = ?", row.split, row.number)

    def leave_out(self, row: Row, refusal: RefusedError) -> None:
        """From now on the row is not wanted."""
        update = "UPDATE rows SET reason = ?, detail = ? WHERE split = ? AND number = ?"
        self._do(update, refusal.reason, refusal.detail, row.split, row.number)

    def wanted(self, split: str | None = None) -> Iterator[Row]:
        """The rows that are not left out, of all lists or of one."""
        where = "reason = ''" if split is None else "reason = '' AND split = ?"
        for _, *cells in self._pages(FIELDS, where, *([split] if split else [])):
            yield _row(*cells)

    def left_out(self) -> Iterator[Skip]:
        """The other rows, with their reasons."""
        for _, *cells, reason, detail in self._pages(f"{FIELDS}, reason, detail", "reason != ''"):
            yield Skip(_row(*cells), reason, detail)

    def worth_asking(self, of_each: Literal["key", "url"]) -> Iterator[tuple[int, Row]]:
        """Rows that were not left out at once, with their places: the first of each key or URL.

        Two lists may have the same one.
        """
        first = (
            "asked AND NOT EXISTS (SELECT 1 FROM rows AS other WHERE other.id < rows.id "
            f"AND other.asked AND other.key = rows.key AND other.{of_each} = rows.{of_each})"
        )
        for place, *cells in self._pages(FIELDS, first):
            yield place, _row(*cells)

    def resting(self) -> Iterator[Row]:
        """Rows that were left out at once though they have a URL."""
        for _, *cells in self._pages(FIELDS, "key NOTNULL AND NOT asked"):
            yield _row(*cells)

    def at(self, place: int) -> Row:
        """The row of a place."""
        ((_, *cells),) = self._do(f"SELECT {FIELDS} FROM rows WHERE id = ?", place)
        return _row(*cells)

    def reasons(self) -> Mapping[str, Counter[str]]:
        """By list, in order, how many rows are left out for which reason; kept ones have none."""
        count = "SELECT split, reason, COUNT(*) FROM rows GROUP BY split, reason ORDER BY MIN(id)"
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for split, reason, rows in self._do(count):
            found[split][reason] = rows
        return found

    def example(self, split: str, reason: str) -> Skip:
        """The first row of a list that is left out for a reason."""
        where = "split = ? AND reason = ?"
        _, *cells, detail = next(self._pages(f"{FIELDS}, detail", where, split, reason))
        return Skip(_row(*cells), reason, detail)

    def _pages(self, columns: str, where: str, *values: str) -> Iterator[tuple[Any, ...]]:
        """In order, read a page at a time, so that rows may be left out meanwhile."""
        query = f"SELECT {columns} FROM rows WHERE id > ? AND {where} ORDER BY id LIMIT {PAGE}"
        last = 0
        while True:
            page = self._do(query, last, *values)
            yield from page
            if len(page) < PAGE:
                return
            last = page[-1][0]

    def _do(self, statement: str, *values: Any) -> list[Any]:
        """What the database answers."""
        with told():
            return self._db.execute(statement, values).fetchall()


class Chosen(Sequence[Row]):
    """Rows at some places of the lists, read when asked for."""

    def __init__(self, listed: Listed, places: array[int]) -> None:
        self._listed, self._places = listed, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        return self._listed.at(self._places[number])


def _row(
    split: str, number: int, url: str, caption: str, rated: str, sha256: str, key: str | None
) -> Row:
    row = Row(split, number, url, caption, json.loads(rated), sha256)
    if key is not None:
        vars(row)["key"] = key  # It need not be found again.
    return row
