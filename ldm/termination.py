"""A SIGTERM or Ctrl-C that asks a training to stop, where it would have killed it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1
LAUNCHER = "LDM_LAUNCHER"
"""Where a launcher's process number stands in the environment of those that it starts."""


@contextmanager
def taken_over(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have the signals call ``handler`` while the block runs."""
    before = {number: signal.signal(number, handler) for number in ASKING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StoppedError(Exception):
    """What was going on is broken off, because it was asked to stop."""


class Termination:
    """Remembers the first signal that asked; the training looks now and then."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._breaks = False

    def ask(self, number: int, _: FrameType | None = None) -> None:
        """Handle a signal."""
        self.signal = self.signal or number
        if self._breaks:
            self._breaks = False  # Another signal is not to break off what is then put in order.
            raise StoppedError

    @contextmanager
    def breaking(self) -> Iterator[None]:
        """Have a signal break the block off with :class:`StoppedError`, one from before at once."""
        self._breaks = True
        try:
            if self.signal is not None:
                raise StoppedError
            yield
        finally:
            self._breaks = False

    @property
    def exit_code(self) -> int:
        """By the shell's convention: 143 after SIGTERM, 130 after Ctrl-C."""
        return 128 + (self.signal or signal.SIGTERM)


def ask_when_orphaned() -> None:
    """Have SIGTERM sent to this process when its parent dies, however that dies (Linux).

    The parent has put its number into the environment; if it is dead already, SIGTERM comes now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(os.environ[LAUNCHER]):
            os.kill(os.getpid(), signal.SIGTERM)


def ignore(_: int = 0) -> None:
    """Leave the signals to the parent: for a training's worker processes, by worker number."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)


def end_quietly() -> None:
    """Have Ctrl-C end this process where it is, without a traceback, until it is taken over."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
