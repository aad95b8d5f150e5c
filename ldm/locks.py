"""What one process does at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError


@contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock on a file, made if there is none, while the block runs.

    The system lets go of it when the process ends, killed or not. Raises :class:`UserError` with
    ``refusal`` while another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(refusal) from error
        yield
