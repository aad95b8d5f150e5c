"""The data card: what was kept, what was left out, what the pictures and their captions are."""

from __future__ import annotations

import io
import random
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ldm.grid import captioned_grid
from ldm.ingest.buckets import Size, nearest
from ldm.ingest.histogram import chart, histogram
from ldm.ingest.markdown import plain, table
from ldm.ingest.ratings import LICENSE, SCORES
from ldm.ingest.results import Fetched
from ldm.ingest.rows import Row, Skip, ascii_url

SAMPLES, COLUMNS, SEED = 24, 6, 0
"""Of the sheet: how many, how many side by side, and the lot that chooses them."""
LABEL_CHARACTERS, LONG_WORD = 80, re.compile(r"(\S{22})(?=\S)")
"""What has room under a picture, and on a line there."""
MOST_NAMES = 10
"""Of domains or licences in a table."""
GROUPS = {
    "duplicates": ("duplicate", "duplicate content", "near duplicate"),
    "opt-outs": ("not allowed by its site",),
    "blocked": ("blocked",),
}
"""Reasons that the first table counts together."""

Kept = Sequence[tuple[Row, Fetched]]


@dataclass(frozen=True)
class Measure:
    """A number that some samples have, and the file of its chart."""

    file: str
    name: str
    values: Sequence[float]


def card(
    report: Mapping[str, Any], kept: Kept, skipped: Sequence[Skip], sizes: Sequence[Size]
) -> dict[str, bytes]:
    """``card.md`` and its pictures by file name; same input, same bytes.

    ``report`` is that of :func:`ldm.ingest.report.report`; of ``kept`` the pictures of the sheet
    are read; ``sizes`` are those that samples may have.
    """
    measures = _measures(kept)
    spread = [one for one in measures if len(set(one.values)) > 1]
    charts = {one.file: _png(chart(one.name, histogram(one.values))) for one in spread}
    lot = random.Random(SEED).sample(range(len(kept)), min(SAMPLES, len(kept)))
    shown = [kept[at] for at in sorted(lot)]
    parts = [
        "# Data card",
        "What `ldm ingest` made of its lists. `skipped.csv` names every row left out.",
        _overview(report),
        "## Samples",
        f"{len(shown)} of {len(kept):,}, drawn by lot.",
        "![samples](card-samples.png)",
        table(("row", "caption"), [(_place(row), plain(row.caption)) for row, _ in shown]),
        "## Left out",
        _left_out(report),
        "## Sizes, captions, scores",
        _measured(measures),
        _blown_up(kept, sizes),
        *(f"![{one.name}]({one.file})" for one in spread),
        *_buckets(kept, sizes),
        "## Domains",
        _domains(kept, skipped),
        *_licenses(kept),
    ]
    text = "\n\n".join(parts) + "\n"
    return {"card.md": text.encode(), "card-samples.png": _sheet(shown), **charts}


def _overview(report: Mapping[str, Any]) -> str:
    parts: dict[str, Mapping[str, Any]] = {**report["lists"], "all": report}
    named = {reason for reasons in GROUPS.values() for reason in reasons}
    groups = {**GROUPS, "left out otherwise": sorted(set(report["skipped"]) - named)}
    lines: list[tuple[str | int, ...]] = [
        (name, *(part[name] for part in parts.values())) for name in ("rows", "kept")
    ]
    for name, reasons in groups.items():
        lines.append((name, *(_sum(part["skipped"], reasons) for part in parts.values())))
    return table(("", *parts), lines)


def _sum(skipped: Mapping[str, int], reasons: Sequence[str]) -> int:
    return sum(skipped.get(reason, 0) for reason in reasons)


def _left_out(report: Mapping[str, Any]) -> str:
    skipped: Mapping[str, int] = report["skipped"]
    if not skipped:
        return "Nothing."
    lines = [(reason, rows, f"{rows / report['rows']:.2%}") for reason, rows in skipped.items()]
    return table(("reason", "rows", "of all rows"), lines)


def _measures(kept: Kept) -> list[Measure]:
    values: dict[tuple[str, str], Sequence[float]] = {
        ("sides", "shorter side before the crop, in pixels"): [
            min(fetched.width, fetched.height) for _, fetched in kept
        ],
        ("aspects", "longer over shorter side"): [
            max(fetched.width, fetched.height) / min(fetched.width, fetched.height)
            for _, fetched in kept
        ],
        ("captions", "caption, in characters"): [len(row.caption) for row, _ in kept],
    }
    for name in SCORES:
        given = [float(row.rated[name]) for row, _ in kept if name in row.rated]
        if given:
            values[name, name] = given
    return [Measure(f"card-{file}.png", name, numbers) for (file, name), numbers in values.items()]


def _measured(measures: Sequence[Measure]) -> str:
    lines = [
        (one.name, len(one.values), min(one.values), median_low(one.values), max(one.values))
        for one in measures
    ]
    return table(("", "samples", "least", "median", "most"), lines)


def _blown_up(kept: Kept, sizes: Sequence[Size]) -> str:
    crop = f"the crop of {sizes[0][0]} pixels" if len(sizes) == 1 else "their bucket"
    count = 0
    for _, fetched in kept:
        width, height = nearest(fetched.width, fetched.height, sizes)
        count += fetched.width < width or fetched.height < height
    return f"Smaller than {crop}, and blown up to it: {count:,}."


def _buckets(kept: Kept, sizes: Sequence[Size]) -> list[str]:
    """The section, if there are buckets."""
    if len(sizes) == 1:
        return []
    counts = Counter(nearest(fetched.width, fetched.height, sizes) for _, fetched in kept)
    lines = [(f"{width}x{height}", counts[width, height]) for width, height in sizes]
    return ["## Aspect buckets", table(("width x height", "samples"), lines)]


def _domains(kept: Kept, skipped: Sequence[Skip]) -> str:
    """Those with most rows, and how many of these were kept."""
    good = Counter(_domain(row) for row, _ in kept)
    rows = good + Counter(_domain(skip.row) for skip in skipped)
    top = _top(rows)
    lines = [(plain(name), rows[name], good[name]) for name in top]
    if len(top) < len(rows):
        rest = rows.total() - sum(rows[name] for name in top)
        rest_good = good.total() - sum(good[name] for name in top)
        lines.append((f"{len(rows) - len(top):,} others", rest, rest_good))
    return table(("domain", "rows", "kept"), lines)


def _domain(row: Row) -> str:
    url = ascii_url(row.url)
    return urlsplit(url).hostname or "" if url else "none"


def _licenses(kept: Kept) -> list[str]:
    """The section, if any sample has a licence."""
    counts = Counter(row.rated.get(LICENSE, "none given") for row, _ in kept)
    if counts.keys() == {"none given"}:
        return []
    top = _top(counts)
    lines = [(plain(name), counts[name]) for name in top]
    if len(top) < len(counts):
        rest = counts.total() - sum(counts[name] for name in top)
        lines.append((f"{len(counts) - len(top):,} others", rest))
    return ["## Licences", table(("licence", "samples"), lines)]


def _top(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name], name))[:MOST_NAMES]


def _sheet(shown: Kept) -> bytes:
    tiles = [np.asarray(Image.open(io.BytesIO(fetched.read()))) for _, fetched in shown]
    labels = [_label(row) for row, _ in shown]
    columns = min(COLUMNS, len(shown))
    return _png(Image.fromarray(captioned_grid(tiles, labels, [None] * len(shown), columns)))


def _label(row: Row) -> str:
    """List, row, and as much of the caption as there is room, if the font has its letters."""
    if not row.caption.isascii():
        return _place(row)
    text = LONG_WORD.sub(r"\1 ", f"{_place(row)}: {row.caption}")
    return textwrap.shorten(text, LABEL_CHARACTERS, placeholder="…")


def _place(row: Row) -> str:
    return f"{row.split} {row.number}"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
