"""A training's curves as inline SVG: drawn for a width in CSS pixels, coloured by the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTHS = {"wide": 1120, "middle": 720, "narrow": 368}
"""Widths in CSS pixels that charts are drawn for: scaled much more or less, none can be read."""
POINTS = 400
"""Most points that a line is drawn through."""
STOPS = 120
"""Most places along the steps that answer when pointed at."""


@dataclass(frozen=True)
class Curves:
    """Training loss and learning rate, and validation loss, each by step."""

    steps: Sequence[int]
    losses: Sequence[float]
    rates: Sequence[float]
    validated: Sequence[tuple[int, float]]


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round numbers (1, 2 or 5 times a power of ten apart) within a range."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) < most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def numbers(values: Sequence[float]) -> list[str]:
    """Numbers of an axis, all with as many decimals as the finest."""
    plain = [f"{value:g}" for value in values]
    if any("e" in text for text in plain):
        return plain
    decimals = max((len(text.partition(".")[2]) for text in plain), default=0)
    return [f"{value:.{decimals}f}" if value else "0" for value in values]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over ``window`` (odd) values around each, fewer towards the ends."""
    reach = window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = [(max(0, at - reach), min(len(values), at + reach + 1)) for at in range(len(values))]
    return [float(total[last] - total[first]) / (last - first) for first, last in ends]


def window_of(count: int) -> int:
    """The smoothing window for a curve of ``count`` values: about a twelfth of it, odd."""
    return 2 * (count // 25) + 1


@dataclass(frozen=True)
class Plot:
    """A chart's area in CSS pixels and the values at its edges."""

    name: str
    width: int
    height: int
    steps: tuple[float, float]
    values: tuple[float, float]
    left: int = 56
    right: int = 24
    top: int = 10
    bottom: int = 24

    def x(self, step: float) -> float:
        """Pixels from the left."""
        first, last = self.steps
        inner = self.width - self.left - self.right
        return round(self.left + inner * (step - first) / ((last - first) or 1), 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.values
        inner = self.height - self.top - self.bottom
        return round(self.top + inner * (high - value) / ((high - low) or 1), 1)

    def line(self, kind: str, steps: Sequence[float], values: Sequence[float]) -> str:
        """A line through ``POINTS`` points at most, cut off at the chart's edges."""
        stride = max(1, math.ceil(len(steps) / POINTS))
        shown = zip(steps[::stride], values[::stride], strict=True)
        points = " ".join(f"{self.x(step)},{self.y(value)}" for step, value in shown)
        return f'<polyline class="{kind}" clip-path="url(#{self.name})" points="{points}"/>'

    def frame(self, step_ticks: Sequence[float], value_ticks: Sequence[float]) -> str:
        """Grid, axes and their numbers."""
        end, foot = self.width - self.right, self.height - self.bottom
        parts = [
            f'<clipPath id="{self.name}"><rect x="{self.left}" y="{self.top}" '
            f'width="{end - self.left}" height="{foot - self.top}"/></clipPath>'
        ]
        for value, text in zip(value_ticks, numbers(value_ticks), strict=True):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{self.left} {y}H{end}"/>')
            parts.append(f'<text class="value" x="{self.left - 8}" y="{y + 4}">{text}</text>')
        for step in step_ticks:
            x = self.x(step)
            parts.append(f'<path class="tick" d="M{x} {foot}v4"/>')
            parts.append(f'<text class="step" x="{x}" y="{foot + 17}">{step:,.0f}</text>')
        parts.append(f'<path class="axis" d="M{self.left} {foot}H{end}"/>')
        parts.append(f'<text class="label" x="{self.left - 8}" y="{foot + 17}">step</text>')
        return "".join(parts)

    def stops(self, steps: Sequence[float], texts: Sequence[str]) -> list[str]:
        """Upright strips, ``STOPS`` at most, that say their text when pointed at."""
        stride = max(1, math.ceil(len(steps) / STOPS))
        foot = self.height - self.bottom
        wide = (self.width - self.left - self.right) / max(1, len(steps[::stride]))
        return [
            f'<g class="stop"><title>{text}</title><rect x="{self.x(step) - wide / 2:.1f}" '
            f'y="{self.top}" width="{wide:.1f}" height="{foot - self.top}"/>'
            f'<path d="M{self.x(step)} {self.top}V{foot}"/></g>'
            for step, text in zip(steps[::stride], texts[::stride], strict=True)
        ]

    def svg(self, says: str, parts: Iterable[str]) -> str:
        """The whole chart."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" aria-label="{says}">{"".join(parts)}</svg>'
        )


def charts(curves: Curves, width: int) -> tuple[str, str]:
    """The loss chart, and the thin one of the learning rate on the same steps if it was logged."""
    last = max([*curves.steps, *(step for step, _ in curves.validated)], default=1)
    marks = ticks(0, last, 9 if width > 600 else 5)
    rate = _rate_chart(curves, width, last, marks) if curves.steps else ""
    return _loss_chart(curves, width, last, marks), rate


def _loss_chart(curves: Curves, width: int, last: int, marks: list[float]) -> str:
    smoothed = smooth(curves.losses, window_of(len(curves.losses)))
    raw = np.percentile(curves.losses, (1, 99)).tolist() if curves.losses else []
    shown = [*smoothed, *raw, *(value for _, value in curves.validated)]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.06 * ((high - low) or 1)
    edges = (max(0.0, low - margin), high + margin)
    plot = Plot(f"loss-{width}", width, 300 if width > 600 else 240, (0, last), edges)
    texts = [
        f"step {step:,}: loss {loss:.4f}, smoothed {mean:.4f}"
        for step, loss, mean in zip(curves.steps, curves.losses, smoothed, strict=True)
    ]
    parts = [
        plot.frame(marks, ticks(*edges, 6)),
        plot.line("raw", curves.steps, curves.losses),
        plot.line("smooth", curves.steps, smoothed),
        *plot.stops(curves.steps, texts),
    ]
    parts += [
        f'<circle class="val" cx="{plot.x(step)}" cy="{plot.y(value)}" r="4">'
        f"<title>step {step:,}: validation loss {value:.4f}</title></circle>"
        for step, value in curves.validated
    ]
    return plot.svg("training and validation loss by step", parts)


def _rate_chart(curves: Curves, width: int, last: int, marks: list[float]) -> str:
    top = max(curves.rates) or 1.0
    plot = Plot(f"rate-{width}", width, 100, (0, last), (0, 1.08 * top))
    texts = [
        f"step {step:,}: learning rate {rate:.3g}"
        for step, rate in zip(curves.steps, curves.rates, strict=True)
    ]
    parts = [
        plot.frame(marks, ticks(*plot.values, 3)),
        plot.line("rate", curves.steps, curves.rates),
        *plot.stops(curves.steps, texts),
    ]
    return plot.svg("learning rate by step", parts)
