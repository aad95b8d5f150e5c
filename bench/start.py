"""From the command ``ldm train`` to its first step, at ``tiny``, without MLflow and with it.

MLflow makes a new database each time. Needs ``artifacts/latents`` (``make demo`` makes it).
"""

from __future__ import annotations

import time
from statistics import median

from bench.launched import training

ROUNDS = 5
WAYS = {"without MLflow": "false", "with MLflow": "true"}
"""Values of ``train.track``."""


def main() -> None:
    """Print the seconds of both, started in turns."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, track in WAYS.items():
            seconds[way].append(to_first_step(track))
    print("\nseconds from the command `ldm train` to its first step, tiny")
    for way, found in seconds.items():
        print(f"{way:>20} {median(found):6.1f}   ({min(found):.1f} to {max(found):.1f})")


def to_first_step(track: str) -> float:
    """Seconds from the command to the first line of its log, which has every step."""
    begin = time.perf_counter()
    with training("log_every=1", f"track={track}") as comes:
        return comes(1) - begin
