"""Aspect buckets: the few sizes that samples have, so that little of a picture is cropped away.

After NovelAI's aspect ratio bucketing (github.com/NovelAI/novelai-aspect-ratio-bucketing): sizes of
about the square's area whose sides are multiples of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ldm.config import Ingest

Size = tuple[int, int]
"""Width and height in pixels."""


def buckets_of(config: Ingest) -> tuple[Size, ...]:
    """The sizes that samples may have: the square alone, or aspect buckets."""
    if config.bucket_step is None:
        return ((config.image_size, config.image_size),)
    return buckets(config.image_size, config.bucket_step, config.max_aspect)


def buckets(side: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """For each longer side, the longest shorter one with up to ``side * side`` pixels; both ways.

    Sides are multiples of ``step``, of which ``side`` is one; the longer over the shorter is at
    most ``max_aspect``. In order of width.
    """
    area = side * side
    pairs = ((long, area // long // step * step) for long in range(side, area // step + 1, step))
    wide = [(long, short) for long, short in pairs if long <= max_aspect * short]
    return tuple(sorted({*wide, *((short, long) for long, short in wide)}))


def nearest(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size that keeps most of a picture which is scaled to cover it and cropped.

    That is the nearest one in log aspect. Nothing whose shorter side is the square's or longer is
    blown up.
    """
    return max(sizes, key=lambda size: _kept(width, height, size))


def _kept(width: int, height: int, size: Size) -> Fraction:
    """Share of the picture that is left. Exact, so that every machine finds the same bucket."""
    one, other = width * size[1], height * size[0]
    return Fraction(min(one, other), max(one, other))
