"""Tables for the time of a run, in a file that nobody else sees and that goes with the process."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from ldm.ingest.database import disk_told


def scratch_database(tables: str) -> sqlite3.Connection:
    """An empty database with these tables; SQLite keeps some 2 MB of it in memory."""
    with told():
        database = sqlite3.connect("", isolation_level=None)
        database.executescript("PRAGMA journal_mode = OFF;" + tables)
        return database


def told() -> AbstractContextManager[None]:
    """What such a database says, in a line: UserError where its disk is full."""
    elsewhere = "name another folder in TMPDIR for the rows of the lists"
    room = f"make room on that disk, or {elsewhere}"
    return disk_told(Path(tempfile.gettempdir()), room, elsewhere)
