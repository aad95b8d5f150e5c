"""Tables for the time of a run, in a file that nobody else sees and that goes with the process."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from ldm.errors import UserError


def scratch_database(tables: str) -> sqlite3.Connection:
    """An empty database with these tables; SQLite keeps some 2 MB of it in memory."""
    with told():
        database = sqlite3.connect("", isolation_level=None)
        database.executescript("PRAGMA journal_mode = OFF;" + tables)
        return database


@contextmanager
def told() -> Iterator[None]:
    """What such a database says, in a line: UserError where its disk is full."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise UserError(
            f"{tempfile.gettempdir()}: the rows of the lists cannot be kept there ({error}); make "
            "room on that disk, or name another folder in TMPDIR"
        ) from error
