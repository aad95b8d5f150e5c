"""What SQLite says of a database, in a line."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError


@contextmanager
def disk_told(place: Path, remedy: str, if_damaged: str) -> Iterator[None]:
    """Turn what its disk does to the database at ``place`` into a :class:`UserError`.

    With the remedy where it cannot be read or written, or another one where it is damaged.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        raise UserError(f"{place}: cannot be used ({error}); {remedy}") from error
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:
            raise  # Its other kinds are of wrong statements.
        raise UserError(f"{place}: is damaged ({error}); {if_damaged}") from error
