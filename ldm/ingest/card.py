"""The data card: what was kept, what was left out, what the pictures and their captions are."""

from __future__ import annotations

import io
import random
import re
import textwrap
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from ldm.ingest.rows import Row

SAMPLES, COLUMNS, SEED = 24, 6, 0
"""Of the sheet: how many, how many side by side, and the lot that chooses them."""
LABEL_CHARACTERS, LONG_WORD = 80, re.compile(r"(\S{22})(?=\S)")
"""What has room under a picture, and on a line there."""
MOST_NAMES = 10
"""Of domains or licences in a table."""
NO_LICENSE = "none given"
GROUPS = {
    "duplicates": ("duplicate", "duplicate content", "near duplicate"),
    "opt-outs": ("not allowed by its site",),
    "blocked": ("blocked",),
}
"""Reasons that the first table counts together."""

Shown = Sequence[tuple[Row, Fetched]]


@dataclass(frozen=True)
class Measure:
    """A number that some samples have, and the file of its chart."""

    file: str
    name: str
    values: array[Any]


class Tally:
    """What there is to say of the kept rows, a few bytes of each."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self.sides, self.captions = (array("q") for _ in range(2))
        self.aspects = array("d")
        self.scores = {name: array("d") for name in SCORES}
        self.sizes, self.by_size, self.blown_up = sizes, Counter[Size](), 0
        self.domains, self.licenses = Counter[str](), Counter[str]()

    def add(self, row: Row, fetched: Fetched) -> None:
        """Take in a sample."""
        shorter, longer = sorted((fetched.width, fetched.height))
        self.sides.append(shorter)
        self.aspects.append(longer / shorter)
        self.captions.append(len(row.caption))
        for name, values in self.scores.items():
            if name in row.rated:
                values.append(float(row.rated[name]))
        width, height = size = nearest(fetched.width, fetched.height, self.sizes)
        self.by_size[size] += 1
        self.blown_up += fetched.width < width or fetched.height < height
        self.domains[_domain(row)] += 1
        self.licenses[row.rated.get(LICENSE, NO_LICENSE)] += 1

    def measures(self) -> list[Measure]:
        """All numbers that there are."""
        values: dict[tuple[str, str], array[Any]] = {
            ("sides", "shorter side before the crop, in pixels"): self.sides,
            ("aspects", "longer over shorter side"): self.aspects,
            ("captions", "caption, in characters"): self.captions,
            **{(name, name): scores for name, scores in self.scores.items() if scores},
        }
        return [Measure(f"card-{file}.png", name, own) for (file, name), own in values.items()]


def card(
    report: Mapping[str, Any],
    kept: Iterable[tuple[Row, Fetched]],
    left_out: Iterable[Row],
    sizes: Sequence[Size],
) -> dict[str, bytes]:
    """``card.md`` and its pictures by file name; same input, same bytes.

    ``report`` is that of :func:`ldm.ingest.report.report`; of ``kept`` the pictures of the sheet
    are read; ``sizes`` are those that samples may have.
    """
    lot = random.Random(SEED).sample(range(report["kept"]), min(SAMPLES, report["kept"]))
    drawn, shown, tally = set(lot), [], Tally(sizes)
    for at, (row, fetched) in enumerate(kept):
        tally.add(row, fetched)
        if at in drawn:
            shown.append((row, fetched))
    measures = tally.measures()
    spread = [one for one in measures if min(one.values) != max(one.values)]
    charts = {one.file: _png(chart(one.name, histogram(one.values))) for one in spread}
    parts = [
        "# Data card",
        "What `ldm ingest` made of its lists. `skipped.csv` names every row left out.",
        _overview(report),
        "## Samples",
        f"{len(shown)} of {report['kept']:,}, drawn by lot.",
        "![samples](card-samples.png)",
        table(("row", "caption"), [(_place(row), plain(row.caption)) for row, _ in shown]),
        "## Left out",
        _left_out(report),
        "## Sizes, captions, scores",
        _measured(measures),
        _blown_up(tally),
        *(f"![{one.name}]({one.file})" for one in spread),
        *_buckets(tally),
        "## Domains",
        _domains(tally.domains, left_out),
        *_licenses(tally.licenses),
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


def _measured(measures: Sequence[Measure]) -> str:
    lines = []
    for one in measures:
        values = np.sort(one.values)
        middle = (len(values) - 1) // 2  # The lower of two.
        lines.append((one.name, len(values), *values[[0, middle, -1]].tolist()))
    return table(("", "samples", "least", "median", "most"), lines)


def _blown_up(tally: Tally) -> str:
    sizes = tally.sizes
    crop = f"the crop of {sizes[0][0]} pixels" if len(sizes) == 1 else "their bucket"
    return f"Smaller than {crop}, and blown up to it: {tally.blown_up:,}."


def _buckets(tally: Tally) -> list[str]:
    """The section, if there are buckets."""
    if len(tally.sizes) == 1:
        return []
    lines = [(f"{width}x{height}", tally.by_size[width, height]) for width, height in tally.sizes]
    return ["## Aspect buckets", table(("width x height", "samples"), lines)]


def _domains(good: Counter[str], left_out: Iterable[Row]) -> str:
    """Those with most rows, and how many of these were kept."""
    rows = good + Counter(map(_domain, left_out))
    top = _top(rows)
    lines = [(plain(name), rows[name], good[name]) for name in top]
    if len(top) < len(rows):
        rest = rows.total() - sum(rows[name] for name in top)
        rest_good = good.total() - sum(good[name] for name in top)
        lines.append((f"{len(rows) - len(top):,} others", rest, rest_good))
    return table(("domain", "rows", "kept"), lines)


def _domain(row: Row) -> str:
    return urlsplit(row.plain_url).hostname or "" if row.plain_url else "none"


def _licenses(counts: Counter[str]) -> list[str]:
    """The section, if any sample has a licence."""
    if counts.keys() == {NO_LICENSE}:
        return []
    top = _top(counts)
    lines = [(plain(name), counts[name]) for name in top]
    if len(top) < len(counts):
        rest = counts.total() - sum(counts[name] for name in top)
        lines.append((f"{len(counts) - len(top):,} others", rest))
    return ["## Licences", table(("licence", "samples"), lines)]


def _top(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name], name))[:MOST_NAMES]


def _sheet(shown: Shown) -> bytes:
    tiles = [np.asarray(Image.open(io.BytesIO(fetched.read()))) for _, fetched in shown]
    labels = [_label(row) for row, _ in shown]
    columns = min(COLUMNS, len(shown))
    return _png(Image.fromarray(captioned_grid(tiles, labels, columns)))


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
