"""Checkpoints written while the training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from ldm.checkpoint import Checkpoint, save
from ldm.memory import available


class Saver:
    """Writes checkpoints beside the training, one at a time.

    An error of writing is raised at once, by the next call, or on leaving.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self._run, self._keep = run, keep
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[Path] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def save(self, checkpoint: Checkpoint, *, last: bool = False) -> None:
        """Copy the state and return; it is written while the training goes on.

        The ``last`` one, which nothing changes any more, is written from where it is. So is one
        whose copy would leave no room for the next step, which takes no more than that itself.
        """
        self.wait()
        if last or available() < 2 * checkpoint.size:
            save(self._run, checkpoint, self._keep)
        else:
            self._pending = self._pool.submit(save, self._run, checkpoint.copied(), self._keep)

    def wait(self) -> None:
        """Until the last one is on disk."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
