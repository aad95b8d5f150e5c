"""Two ways of doing the same, in turns on one machine: their speeds and the ratio."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median

import torch

Way = tuple[str, Callable[[], object]]


def compare(title: str, first: Way, second: Way, units: float, rounds: int) -> float:
    """Print units a second of both ways by round; the median of second over first."""
    for _, run in (first, second):
        run()

    def speed(way: Way) -> Callable[[], float]:
        return lambda: units / timed(way[1])

    return in_turns(title, (first[0], speed(first)), (second[0], speed(second)), rounds)


def in_turns(
    title: str,
    first: tuple[str, Callable[[], float]],
    second: tuple[str, Callable[[], float]],
    rounds: int,
) -> float:
    """Print both speeds, each measured by its function, by round; the median of their ratio."""
    speeds = ((first[1](), second[1]()) for _ in range(rounds))
    return table(title, (first[0], second[0]), speeds)


def table(title: str, names: tuple[str, str], speeds: Iterable[tuple[float, float]]) -> float:
    """Print two ways' speeds by round, as they come; the median of second over first."""
    print(f"\n{title}\n{names[0]:>24} {names[1]:>24} {'ratio':>7}")
    ratios = []
    for first, second in speeds:
        ratios.append(second / first)
        print(f"{first:24.2f} {second:24.2f} {ratios[-1]:7.3f}", flush=True)
    print(f"{'median':>49} {median(ratios):7.3f}")
    return median(ratios)


def timed(run: Callable[[], object]) -> float:
    """Seconds that one call takes, to the end of what it had a GPU do."""
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
