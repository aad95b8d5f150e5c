"""Learning rate over time."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, *, total: int, warmup: int, final: float = 0.0) -> float:
    """Factor on the peak learning rate at ``step`` (0-based), in [0, 1].

    Linear from 0 over ``warmup`` steps, then half a cosine down to ``final`` at ``total``
    (SGDR, arXiv:1608.03983, eq. 5, without restarts).
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
