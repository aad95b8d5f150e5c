"""Random numbers that are a function of a seed and a place, of no worker, rank or earlier draw."""

from __future__ import annotations

import numpy as np

TRAIN, VALIDATION, ORDER, TIMESTEPS, BUCKETS, DROPOUT, FLIPS = range(7)
"""Streams of random numbers under one seed."""


def counter_based(seed: int, stream: int, counter: int, part: int = 0) -> np.random.Generator:
    """An independent generator for each (seed, stream, counter, part)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, counter, part]))
