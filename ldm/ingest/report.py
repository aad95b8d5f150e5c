"""What the stage tells of a run: counts, the rows left out, one line."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.ingest.listed import Listed
from ldm.ingest.reasons import DEFAULT_REMEDY, REMEDIES
from ldm.ingest.rows import Skip

LONGEST_URL = 8000
"""Characters of one that is written; readers of CSV have a limit for a cell."""
Reasons = Mapping[str, Counter[str]]
"""By list how many of its rows are left out for which reason; the kept ones have an empty one."""


def expect_yields(listed: Listed, data: Path, min_yield: float) -> None:
    """Raise :class:`UserError` when less than ``min_yield`` of a list's rows, or none, is kept.

    The message names the commonest reason of that list, a row of it, the remedy.
    """
    for split, reasons in listed.reasons().items():
        rows, kept = reasons.total(), reasons.pop("", 0)
        if kept and kept >= min_yield * rows:
            continue
        reason, count = min(reasons.items(), key=lambda item: -item[1])
        example = listed.example(split, reason)
        detail = f": {example.detail}" if example.detail else ""
        raise UserError(
            f"{data / split}.csv: {kept} of {rows} rows kept, ingest.min_yield asks for "
            f"{min_yield:.0%}; mostly {reason} ({count} rows, such as row {example.row.number}"
            f"{detail}); {REMEDIES.get(reason, DEFAULT_REMEDY)}"
        )


def report(reasons: Reasons) -> dict[str, Any]:
    """Counts over all lists and of each: rows, kept, skipped by reason, commonest first."""

    def part(own: Counter[str]) -> dict[str, Any]:
        skipped = sorted(own.items(), key=lambda item: (-item[1], item[0]))
        return {
            "rows": own.total(),
            "kept": own[""],
            "skipped": {reason: rows for reason, rows in skipped if reason},
        }

    whole = sum(reasons.values(), Counter[str]())
    return {**part(whole), "lists": {split: part(own) for split, own in reasons.items()}}


def write_skipped(path: Path, skipped: Iterable[Skip]) -> None:
    """The rows left out as CSV: split, row, url, reason, detail.

    Of a URL that is a picture itself (``data:``) the head.
    """
    lines = (
        (skip.row.split, skip.row.number, skip.row.url[:LONGEST_URL], skip.reason, skip.detail)
        for skip in skipped
    )
    _write(path, ("split", "row", "url", "reason", "detail"), lines)


def write_hashes(path: Path, files: Iterable[tuple[str, str | None]]) -> None:
    """URLs with the sha256 of their files as CSV; those without one are left out."""
    _write(path, ("url", "sha256"), (one for one in files if one[1]))


def _write(path: Path, head: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(lines)


def line(report: Mapping[str, Any], asked: int, out: Path) -> str:
    """The stage's line of result; ``asked`` is of this run."""
    skipped: Mapping[str, int] = report["skipped"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    why = f" ({reasons})" if reasons else ""
    return (
        f"ingest: {report['rows']} rows, {report['kept']} kept, "
        f"{sum(skipped.values())} skipped{why}, {asked} URLs asked -> {out}"
    )
