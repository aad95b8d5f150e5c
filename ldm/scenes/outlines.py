"""Made-up shapes with made-up names: what a model saw of the world before it meets a new word.

A model that knows six shapes has no reason to expect a seventh. One that was made from many, each
with a name spelled from the same letters and bytes as any other word, has learned that a name is an
outline, and takes a new one from few pictures, as a model trained on the open web does.
"""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np

COUNT = 160
HARMONICS = 4
FINE = 64

Corners = tuple[np.ndarray, np.ndarray]


def _names() -> dict[str, str]:
    """English name to Chinese name; two or three syllables, two characters."""
    rng = random.Random("outlines")
    names: dict[str, str] = {}
    while len(names) < COUNT:
        syllables = (
            rng.choice("bcdfghjklmnprstvz") + rng.choice("aeiou") + rng.choice(("", "", *"lnrst"))
            for _ in range(rng.choice((2, 2, 3)))
        )
        characters = (chr(rng.randrange(0x4E00, 0x9FA6)) for _ in range(2))
        names["".join(syllables)] = "".join(characters)
    return names


OUTLINES = _names()
"""The made-up shapes: English name to Chinese name."""


@cache
def corners(name: str) -> Corners:
    """The outline's corners: angles in radians, rising, and distances from the centre, at most 1.

    Half of the outlines have 3 to 8 corners with edges between them, half are so finely cornered
    that they look smooth.
    """
    rng = random.Random(name)
    while True:
        at, distance = _polygon(rng) if rng.random() < 0.5 else _smooth(rng)
        distance = distance / distance.max()
        if 0.1 < distance.min() < 0.5:
            return at, distance


def _polygon(rng: random.Random) -> Corners:
    count, turn = rng.randint(3, 8), rng.uniform(0, 2 * math.pi)
    places = np.arange(count) + [rng.uniform(-0.2, 0.2) for _ in range(count)]
    distance = np.array([rng.uniform(0.25, 1) for _ in range(count)])
    return turn + places * (2 * math.pi / count), distance


def _smooth(rng: random.Random) -> Corners:
    at = np.arange(FINE) * (2 * math.pi / FINE)
    waves = [
        rng.uniform(-0.3, 0.3) * np.cos(harmonic * at + rng.uniform(0, 2 * math.pi))
        for harmonic in range(1, HARMONICS + 1)
    ]
    return at, np.maximum(0.6 + np.sum(waves, axis=0), 0.05)


def inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points of [-1, 1]^2 are within the outline: bool, of the same shape."""
    at, distance = corners(name)
    angle = np.arctan2(v, u)
    after = np.searchsorted(at, at[0] + (angle - at[0]) % (2 * math.pi), side="right") % len(at)
    before = after - 1
    span = (at[after] - at[before]) % (2 * math.pi)
    turned = (angle - at[before]) % (2 * math.pi)
    # The edge between two corners, in polar form.
    weights = distance[before] * np.sin(turned) + distance[after] * np.sin(span - turned)
    return np.hypot(u, v) * weights <= distance[before] * distance[after] * np.sin(span)
