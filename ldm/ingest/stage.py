"""The stage: lists in, verified shards of pictures out."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ldm.artifacts import digest_file, write_json, write_whole, writing
from ldm.config import Ingest
from ldm.ingest.blocklist import Blocklist, read_blocklist
from ldm.ingest.buckets import buckets_of
from ldm.ingest.card import card
from ldm.ingest.fetch import fetch
from ldm.ingest.repack import Fetched, repack, results
from ldm.ingest.report import expect_yield, line, report, table
from ldm.ingest.rows import Row, Skip, read_list, sort_out
from ldm.progress import say
from ldm.scenes.lists import ORIGIN
from ldm.scenes.origin import serving_scenes

SPLITS = ("train", "validation")

NOT_IN_BYTES = frozenset(
    {"timeout_s", "retries", "processes", "threads", "serve_scenes", "min_yield", "blocked"}
)
"""Settings of how pictures are fetched, not of what is written of them; a file is in the inputs."""


def ingest(config: Ingest, data: Path, out: Path) -> None:
    """Fetch the pictures that ``data/train.csv`` and ``data/validation.csv`` name into ``out``.

    ``out`` becomes a directory of kind ``images``: ``SPLIT-NNNNN.tar``, or with aspect buckets
    ``SPLIT-WIDTHxHEIGHT-NNNNN.tar``, with one sample a kept row, ``report.json`` with counts,
    ``skipped.csv`` with every row left out and why, and ``card.md`` with its pictures. What
    img2dataset says stays in a hidden log beside ``out``.

    Raises :class:`UserError` when a list or the block list is unusable, the download fails, or less
    than ``config.min_yield`` of a list is kept; an earlier ``out`` then stays as it was.
    """
    paths = {split: data / f"{split}.csv" for split in SPLITS}
    rows = {split: read_list(path, split, config.max_caption) for split, path in paths.items()}
    sizes = {path: len(rows[split]) for split, path in paths.items()}
    inputs = {path.name: digest_file(path) for path in paths.values()}
    blocked = Blocklist()
    if config.blocked is not None:
        blocked = read_blocklist(Path(config.blocked), config.near_duplicates)
        inputs["blocked"] = digest_file(Path(config.blocked))
    sorted_out = [sort_out(rows[split], config) for split in SPLITS]
    wanted = [row for usable, _ in sorted_out for row in usable]
    skipped = [skip for _, unusable in sorted_out for skip in unusable]
    # Before the downloads, which may take days.
    _expect_yields(sizes, Counter(row.split for row in wanted), skipped, config.min_yield)
    counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    with (
        _scratch(out) as scratch,
        writing(out, "images", config=_lasting(config), inputs=inputs, counts=counts) as fresh,
    ):
        pictures = _fetched(wanted, scratch, out.parent / f".{out.name}.log", config)
        kept, refused = repack(wanted, pictures, blocked, fresh, config)
        counts.update(Counter(row.split for row, _ in kept))
        skipped = _in_list_order(skipped + refused)
        _expect_yields(sizes, counts, skipped, config.min_yield)
        summary = report({path.stem: size for path, size in sizes.items()}, counts, skipped)
        write_json(fresh / "report.json", summary)
        write_whole(fresh / "skipped.csv", table(skipped))
        for name, content in card(summary, kept, skipped, buckets_of(config)).items():
            write_whole(fresh / name, content)
    say(line(summary, out))


def _expect_yields(
    sizes: Mapping[Path, int], kept: Mapping[str, int], skipped: Sequence[Skip], min_yield: float
) -> None:
    """For each list; ``kept`` by split."""
    for path, size in sizes.items():
        own = [skip for skip in skipped if skip.row.split == path.stem]
        expect_yield(path, size, kept[path.stem], own, min_yield)


def _fetched(rows: Sequence[Row], scratch: Path, log: Path, config: Ingest) -> dict[int, Fetched]:
    """Results by index of ``rows``; the embedded scenes are served if any row wants one."""
    embedded = any(row.url.startswith(f"{ORIGIN}/") for row in rows)
    with serving_scenes() if embedded and config.serve_scenes else nullcontext():
        folder = fetch(rows, scratch, log, config)
    return results(folder, config.image_format)


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that is gone after the block."""
    folder = out.parent / f".{out.name}.scratch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lasting(config: Ingest) -> dict[str, Any]:
    """The settings that decide the output's bytes."""
    unused = {"quality": config.image_format == "png", "bucket_step": config.bucket_step is None}
    without = NOT_IN_BYTES | {key for key, is_unused in unused.items() if is_unused}
    return {key: value for key, value in config.as_dict().items() if key not in without}


def _in_list_order(skipped: Sequence[Skip]) -> list[Skip]:
    return sorted(skipped, key=lambda skip: (SPLITS.index(skip.row.split), skip.row.number))
