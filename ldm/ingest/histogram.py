"""How values are spread: counted between round edges, drawn as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MOST_BINS = 14
TAIL = 99
"""Percentile; where the largest values are far above, one last bin holds the rest."""
ROUND, FINEST = (1, 2, 5, 10), 1e-6
"""Widths of a bin, times a power of ten, and the least of them."""

SCALE = 2
"""Pixels a unit below, so that letters are sharp on a fine screen."""
WIDTH, HEIGHT, MARGIN, TOP, FOOT = 760, 200, 14, 50, 26
WIDEST_BAR, GAP = 64, 2
FONT, TITLE = ImageFont.load_default(11 * SCALE), ImageFont.load_default(13 * SCALE)
"""Pillow's own: there on every machine, so that equal charts have equal bytes."""
PAPER, INK, SOFT, LINE, BAR = "#ffffff", "#1d1c1a", "#6a6760", "#e5e2db", "#3d5fc4"


@dataclass(frozen=True)
class Histogram:
    """``counts`` of the values from each edge up to the next; the last bin includes its end."""

    edges: Sequence[float]
    counts: Sequence[int]
    open_end: bool
    """The last bin has no end, and no edge: as many edges as counts."""


def histogram(values: Sequence[float]) -> Histogram:
    """Count values in about ``MOST_BINS`` bins; whole numbers get whole edges."""
    low, high, largest = min(values), float(np.percentile(values, TAIL)), max(values)
    step = _round_step(high - low)
    if np.asarray(values).dtype.kind == "i":
        step = max(1, step)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    edges = [round(step * number, 12) for number in range(first, last + 1)]
    open_end = largest > edges[-1]
    counts = np.histogram(values, [*edges, math.inf] if open_end else edges)[0]
    return Histogram(edges, counts.tolist(), open_end)


def _round_step(span: float) -> float:
    """A round number, so that ``MOST_BINS`` steps or fewer make up the span."""
    least = max(span / MOST_BINS, FINEST)
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in ROUND if least <= power * factor)


def chart(title: str, shown: Histogram) -> Image.Image:
    """Bars with their counts above and the edges below: RGB, ``WIDTH`` x ``HEIGHT`` units."""
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
    draw = ImageDraw.Draw(image)
    wide = min(WIDEST_BAR, (WIDTH - 2 * MARGIN) // len(shown.counts)) * SCALE
    left, foot = MARGIN * SCALE, (HEIGHT - FOOT) * SCALE
    tallest, baseline = foot - TOP * SCALE, foot + 16 * SCALE
    draw.text((left, MARGIN * SCALE), title, INK, TITLE, anchor="lt")
    for at, count in enumerate(shown.counts):
        x, tall = left + at * wide, round(tallest * count / max(shown.counts))
        if count:
            bar = (x + GAP, foot - max(tall, SCALE), x + wide - GAP - 1, foot - 1)
            draw.rectangle(bar, BAR)
            draw.text((x + wide // 2, bar[1] - 4), f"{count:,}", SOFT, FONT, anchor="ms")
    draw.line((left, foot, left + wide * len(shown.counts), foot), LINE, SCALE)
    for at, edge in enumerate(shown.edges):
        draw.text((left + at * wide, baseline), f"{edge:,g}", SOFT, FONT, anchor="ms")
    if shown.open_end:
        end = left + wide * len(shown.counts)
        draw.text((end, baseline), "more", SOFT, FONT, anchor="rs")
    return image
