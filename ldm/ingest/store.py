"""What URLs gave, kept in ``runs/fetched`` so that each is asked once.

DVC deletes a stage's outputs before it runs; this folder is none, and outlives that. Finished
pictures and lasting refusals stand under the key of their URL, with a digest of what decided them;
what was refused for a passing reason is asked again by the next run. The sha256 of the file that a
URL gave first is remembered, and other content is not trusted.

A run's results stand beside those of the last finished run until it has finished itself
(:meth:`Store.finish`), so that a killed one goes on and a failed one costs nothing. Then what is no
longer wanted is overwritten and gone.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ldm.ingest.basis import Basis
from ldm.ingest.database import disk_told
from ldm.ingest.reasons import RefusedError, may_pass
from ldm.ingest.results import Fetched, Result
from ldm.ingest.rows import Row
from ldm.progress import say

FILE = "fetched.db"
SETTINGS = """
PRAGMA auto_vacuum = FULL;
PRAGMA secure_delete = ON;
"""
TABLES = """
CREATE TABLE IF NOT EXISTS first (key TEXT PRIMARY KEY, sha256 TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pictures (id INTEGER PRIMARY KEY, sha256 TEXT, content BLOB);
CREATE TABLE IF NOT EXISTS results (
    key TEXT, fresh INTEGER, basis TEXT, reason TEXT, detail TEXT,
    sha256 TEXT, width INTEGER, height INTEGER, picture INTEGER,
    PRIMARY KEY (key, fresh)
) WITHOUT ROWID;
CREATE TEMP TABLE wanted (key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE listed (key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE passing (key TEXT PRIMARY KEY, reason TEXT, detail TEXT) WITHOUT ROWID;
"""
"""``fresh``: 1 for a result since the last finished run, else 0."""
FINISH = """
DELETE FROM results WHERE basis NOT IN (:picture, :refusal)
UPDATE OR REPLACE results SET fresh = 0
DELETE FROM results WHERE key NOT IN (SELECT key FROM wanted)
DELETE FROM pictures WHERE id NOT IN (SELECT picture FROM results WHERE picture NOTNULL)
DELETE FROM first WHERE key NOT IN (SELECT key FROM listed)
"""
SHOWN = 12
"""Digits of a hash in a message, where the whole is not needed."""


class _Result(NamedTuple):
    """A line of the table; ``reason`` is empty, or the rest is of no picture."""

    reason: str
    detail: str
    sha256: str
    width: int
    height: int
    picture: int


class Store:
    """Results by URL in a folder, for one process at a time; closed at the end of a ``with`` block.

    Every picture's bytes are checked once, on opening, and a damaged one is asked for again. With
    ``refetch`` nothing is known but what was asked since the last finished run. Methods raise
    :class:`UserError` when the file is damaged or the disk full.
    """

    def __init__(self, folder: Path, basis: Basis, *, refetch: bool = False) -> None:
        self.path, self.basis = folder / FILE, basis
        self.asked = 0  # URLs, since this was opened.
        self._oldest = int(refetch)
        folder.mkdir(parents=True, exist_ok=True)
        with self._told():
            self._db = sqlite3.connect(self.path)
            self._db.executescript(SETTINGS + TABLES)
        self._drop_damaged()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()

    def _drop_damaged(self) -> None:
        with self._writing():
            every = self._db.execute("SELECT id, sha256, content FROM pictures")
            bad = [(number,) for number, sha256, content in every if _sha256(content) != sha256]
            self._db.executemany("DELETE FROM results WHERE picture = ?", bad)
            self._db.executemany("DELETE FROM pictures WHERE id = ?", bad)
        if bad:
            say(f"ingest: {self.path}: {len(bad)} pictures are damaged; they are fetched again")

    def knows(self, row: Row) -> bool:
        """Whether the row's URL need not be asked."""
        found = self._result(row, self._oldest)
        return found is not None and (found.reason != "" or self._trusts(row, found.sha256))

    def take(self, results: Iterable[tuple[Row, Result]]) -> None:
        """Keep what URLs gave: all of it or, when that fails, nothing."""
        with self._writing():
            for row, result in results:
                self.asked += 1
                if isinstance(result, Fetched):
                    self._take_picture(row, result)
                elif may_pass(result.reason):
                    insert = "INSERT OR REPLACE INTO passing VALUES (?, ?, ?)"
                    self._db.execute(insert, (row.key, result.reason, result.detail))
                else:
                    about = _Result(result.reason, result.detail, "", 0, 0, 0)
                    self._write(row, self.basis.refusal, about)

    def _take_picture(self, row: Row, one: Fetched) -> None:
        content = one.read()
        insert = "INSERT INTO pictures (sha256, content) VALUES (?, ?)"
        number = self._db.execute(insert, (_sha256(content), content)).lastrowid
        assert number is not None
        about = _Result("", "", one.sha256, one.width, one.height, number)
        self._write(row, self.basis.picture, about)
        if self._trusts(row, one.sha256):
            self._db.execute("INSERT OR REPLACE INTO first VALUES (?, ?)", (row.key, one.sha256))

    def _write(self, row: Row, basis: str, about: _Result) -> None:
        insert = "INSERT OR REPLACE INTO results VALUES (?, 1, ?, ?, ?, ?, ?, ?, ?)"
        self._db.execute(insert, (row.key, basis, *about))

    def fetched(self, row: Row) -> Fetched:
        """The row's picture. Raises :class:`RefusedError` when there is none that is trusted."""
        found = self._result(row, oldest=0)
        if found is not None and found.reason:
            raise RefusedError(found.reason, found.detail)
        if found is not None and self._trusts(row, found.sha256):
            read = partial(self._read, found.picture)
            return Fetched(found.sha256, found.width, found.height, read)
        if passing := self._one("SELECT reason, detail FROM passing WHERE key = ?", row.key):
            raise RefusedError(*passing)
        if found is None:
            raise RefusedError("no result", "img2dataset said nothing of this row; its log may")
        expected = f"the list says {row.sha256[:SHOWN]}" if row.sha256 else ""
        expected = expected or f"was {(self.first(row) or '')[:SHOWN]}"
        raise RefusedError("changed content", f"sha256 is {found.sha256}, {expected}...")

    def first(self, row: Row) -> str | None:
        """The sha256 of the file that the row's URL gave first, or a list vouched for since."""
        found = self._one("SELECT sha256 FROM first WHERE key = ?", row.key)
        return None if found is None else str(found[0])

    def forget_refusals(self) -> None:
        """Forget those since the last finished run."""
        with self._writing():
            self._db.execute("DELETE FROM results WHERE fresh = 1 AND reason != ''")

    def finish(
        self, rows: Iterable[Row], untrusted: Iterable[Row] = (), resting: Iterable[Row] = ()
    ) -> None:
        """End a run: keep what is known of ``rows``, but of the untrusted the first hashes alone.

        So too of the ``resting``, which lists name and the run did not want: what they give when
        they are wanted again must be what it was. Everything else is overwritten and gone.
        """
        asked, gone, idle = (((row.key,) for row in some) for some in (rows, untrusted, resting))
        with self._writing():
            self._db.executemany("INSERT OR IGNORE INTO listed VALUES (?)", asked)
            self._db.execute("INSERT INTO wanted SELECT key FROM listed")
            self._db.executemany("DELETE FROM wanted WHERE key = ?", gone)
            self._db.executemany("INSERT OR IGNORE INTO listed VALUES (?)", idle)
            for statement in FINISH.strip().splitlines():
                self._db.execute(statement, self.basis._asdict())

    def _result(self, row: Row, oldest: int) -> _Result | None:
        found = self._one(
            "SELECT reason, detail, sha256, width, height, picture FROM results "
            "WHERE key = ? AND fresh >= ? AND basis IN (?, ?) ORDER BY fresh DESC",
            *(row.key, oldest, *self.basis),
        )
        return None if found is None else _Result(*found)

    def _trusts(self, row: Row, sha256: str) -> bool:
        return sha256 == (row.sha256 or self.first(row) or sha256)

    def _read(self, picture: int) -> bytes:
        found = self._one("SELECT content FROM pictures WHERE id = ?", picture)
        assert found is not None
        return bytes(found[0])

    def _one(self, query: str, *values: str | int) -> tuple[Any, ...] | None:
        with self._told():
            found: tuple[Any, ...] | None = self._db.execute(query, values).fetchone()
            return found

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction."""
        with self._told(), self._db:
            yield

    def _told(self) -> AbstractContextManager[None]:
        """What the database says, in a line."""
        room = "make room on its disk, or mend that"
        return disk_told(self.path, room, "remove it, and its URLs are asked again")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
