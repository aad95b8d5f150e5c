"""What one process does at a time."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ldm.errors import UserError

BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Random, anew at each start of a Linux kernel."""
LOOK_S = 1.0
"""How long a lock is asked for by default: :func:`is_held` takes it for an instant, to look."""
_holding: set[IO[str]] = set()
"""Open files, by which this process holds locks."""


@contextmanager
def held(
    path: Path, refusal: str, patience_s: float = LOOK_S, *, shared: bool = False
) -> Iterator[None]:
    """Hold a lock on a file, made if there is none, while the block runs; some may if ``shared``.

    The system lets go of it when the process ends, killed or not; processes forked from it do not
    hold it. Raises :class:`UserError` with ``refusal`` if another process still holds it after
    ``patience_s`` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    with path.open("a+") as file:
        while not _taken(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise UserError(refusal)
            time.sleep(0.1)
        _holding.add(file)
        try:
            yield
        finally:
            _holding.discard(file)


def _taken(file: IO[str], how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _let_go() -> None:
    """Close in a forked process what holds its parent's locks; the parent still holds them.

    A training's workers live on for seconds when it is killed.
    """
    for file in _holding:
        file.close()
    _holding.clear()


os.register_at_fork(after_in_child=_let_go)


def is_held(path: Path) -> bool:
    """Whether some process holds the lock on a file, alone or not."""
    if not path.is_file():
        return False
    with path.open("a") as file:
        return not _taken(file, fcntl.LOCK_EX)


def kernel() -> str:
    """What names the running kernel, of which all containers on a machine are part (Linux).

    Its processes see each other's locks; those of another machine may not, on a shared disk.
    """
    return BOOT.read_text().strip() if BOOT.is_file() else platform.node()
