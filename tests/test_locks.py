"""What one process does at a time, and looking whether one does."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from threading import Event, Thread

import pytest

from ldm.errors import UserError
from ldm.locks import LOOK_S, held, is_held


def test_one_process_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "lock"
    with held(lock, "taken"), pytest.raises(UserError, match="taken"), held(lock, "taken"):
        pass
    with held(lock, "free again"):
        lock.write_text("kept")
    with held(lock, "free again"):
        assert lock.read_text() == "kept"


@pytest.mark.parametrize("shared", [True, False])
def test_looking_tells_whether_one_does(tmp_path: Path, shared: bool) -> None:
    lock = tmp_path / "lock"
    assert not is_held(lock) and not lock.exists()
    with held(lock, "taken", shared=shared):
        assert is_held(lock)
    assert not is_held(lock)


def test_who_looks_for_an_instant_is_in_nobodys_way(tmp_path: Path) -> None:
    """Even if it is put to sleep in that instant."""
    lock, looks = tmp_path / "lock", Event()

    def look() -> None:
        with lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            looks.set()
            time.sleep(LOOK_S / 4)

    looker = Thread(target=look)
    looker.start()
    looks.wait()
    with held(lock, "taken"):
        looker.join()
