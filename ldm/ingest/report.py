"""What the stage tells of a run: counts, the rows left out, one line."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.ingest.reasons import DEFAULT_REMEDY, REMEDIES
from ldm.ingest.rows import Skip


def expect_yield(
    path: Path, rows: int, kept: int, skipped: Sequence[Skip], min_yield: float
) -> None:
    """Raise :class:`UserError` when less than ``min_yield`` of a list's rows, or none, is kept.

    ``skipped`` are that list's; the message names their commonest reason, a row of it, the remedy.
    """
    if kept and kept >= min_yield * rows:
        return
    ((reason, count),) = Counter(skip.reason for skip in skipped).most_common(1)
    example = next(skip for skip in skipped if skip.reason == reason)
    detail = f": {example.detail}" if example.detail else ""
    raise UserError(
        f"{path}: {kept} of {rows} rows kept, ingest.min_yield asks for {min_yield:.0%}; "
        f"mostly {reason} ({count} rows, such as row {example.row.number}{detail}); "
        f"{REMEDIES.get(reason, DEFAULT_REMEDY)}"
    )


def report(
    rows: Mapping[str, int], kept: Mapping[str, int], skipped: Sequence[Skip]
) -> dict[str, Any]:
    """Counts over all lists and of each: rows, kept, skipped by reason, commonest first."""

    def part(splits: Iterable[str]) -> dict[str, Any]:
        names = set(splits)
        reasons = Counter(skip.reason for skip in skipped if skip.row.split in names)
        return {
            "rows": sum(rows[split] for split in names),
            "kept": sum(kept[split] for split in names),
            "skipped": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        }

    return {**part(rows), "lists": {split: part([split]) for split in rows}}


def table(skipped: Iterable[Skip]) -> bytes:
    """The rows left out as CSV: split, row, url, reason, detail."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("split", "row", "url", "reason", "detail"))
    for skip in skipped:
        writer.writerow((skip.row.split, skip.row.number, skip.row.url, skip.reason, skip.detail))
    return text.getvalue().encode()


def hashes(files: Mapping[str, str | None]) -> bytes:
    """URLs with the sha256 of their files as CSV; those without one are left out."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("url", "sha256"))
    writer.writerows((url, sha256) for url, sha256 in files.items() if sha256)
    return text.getvalue().encode()


def line(report: Mapping[str, Any], asked: int, out: Path) -> str:
    """The stage's line of result; ``asked`` is of this run."""
    skipped: Mapping[str, int] = report["skipped"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    why = f" ({reasons})" if reasons else ""
    return (
        f"ingest: {report['rows']} rows, {report['kept']} kept, "
        f"{sum(skipped.values())} skipped{why}, {asked} URLs asked -> {out}"
    )
