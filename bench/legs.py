"""The loop of a training in turns with another: legs of so many steps, timed by its log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from bench.compare import synchronize, table, timed
from ldm.config import Registry
from ldm.termination import Termination
from ldm.tracking.live import Live
from ldm.train.trainer import Trainer


class Training(Protocol):
    """Makes a trainer that tells of its lines."""

    def __call__(self, live: Live) -> Trainer:
        """One that logs every so many steps, anew."""


def over(
    title: str,
    other: tuple[str, Callable[[], object]],
    training: Training,
    units: float,
    rounds: int,
) -> float:
    """Print units a second of another loop and of ``training``, by round; the median of the ratio.

    ``other`` takes as many steps as there are from line to line, and makes as many ``units``.
    """
    theirs: list[float] = []

    def turn() -> None:
        theirs.append(timed(other[1]))

    other[1]()
    ours = legs(training, turn, rounds)
    speeds = ((units / first, units / second) for first, second in zip(theirs, ours, strict=True))
    return table(title, (other[0], "ldm train"), speeds)


def steady(every: int) -> dict[str, int]:
    """Settings of a training that goes on, with nothing due but a line each so many steps."""
    never = 10**6
    rare = {"steps": never, "checkpoint_every": never, "validate_every": never}
    return rare | {"log_every": every}


def legs(training: Training, between: Callable[[], object], most: int) -> list[float]:
    """Seconds that ``training`` takes from line to line, so many times; then comes ``between``.

    With bar, log and all that is due after a step: it is :meth:`ldm.train.trainer.Trainer.run`.
    """
    live = _Legs(between, most)
    with suppress(_OverError):
        training(live).run(Termination())
    return live.seconds


class _OverError(Exception):
    """All that was to be timed is."""


class _Legs(Live):
    """What a training tells of its lines takes the time from one to the next."""

    def __init__(self, between: Callable[[], object], most: int) -> None:
        super().__init__(Registry(), Path(), {})
        self.seconds: list[float] = []
        self._between, self._most, self._began = between, most, 0.0

    def write(self, entry: Mapping[str, Any]) -> None:
        """The first line ends the warm-up."""
        assert "loss" in entry, f"{entry}: a step that was skipped costs less than one taken"
        synchronize()
        if self._began:
            self.seconds.append(time.perf_counter() - self._began)
        if len(self.seconds) == self._most:
            raise _OverError
        self._between()
        self._began = time.perf_counter()
