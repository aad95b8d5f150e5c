"""One progress bar a stage, with rate and ETA, then one line of result."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    items: Iterable[Item],
    what: str,
    total: int | None,
    unit: str,
    done: int = 0,
    *,
    shown: bool = True,
) -> tqdm[Item]:
    """Wrap ``items`` in a bar; where no terminal watches, it prints at most every 20 seconds."""
    watched = sys.stderr.isatty()
    return tqdm(
        items,
        desc=what,
        total=total,
        initial=done,
        unit=f" {unit}",
        dynamic_ncols=watched,
        ncols=None if watched else 100,
        mininterval=0.2 if watched else 20,
        maxinterval=1 if watched else 60,
        disable=not shown,
    )


def say(line: str) -> None:
    """Print a stage's line of result. That nobody reads it, as behind ``| head``, is no error."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        # Else Python, which tries once more at its end, says so and exits with 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
