"""Learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Callable

DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""What is left of the peak by the share of the way down that is done. ``cosine``: half of one, as
in SGDR (arXiv:1608.03983, eq. 5) without restarts."""


def rate_factor(step: int, *, total: int, warmup: int, decay: str = "cosine") -> float:
    """Factor on the peak learning rate at ``step`` (0-based), in [0, 1].

    Up a line to 1 in ``warmup`` steps, of which the first moves already; then down by one of
    ``DECAYS``, to its end at ``total``.
    """
    if step < warmup:
        return (step + 1) / warmup
    return DECAYS[decay](min(1.0, (step - warmup) / max(1, total - warmup)))
