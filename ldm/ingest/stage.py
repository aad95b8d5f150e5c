"""The stage: lists in, verified shards of pictures out."""

from __future__ import annotations

import shutil
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ldm.artifacts import digest_file, write_json, write_whole, writing
from ldm.config import Ingest
from ldm.errors import UserError
from ldm.image_shards import SPLITS
from ldm.ingest.basis import basis_of
from ldm.ingest.blocklist import Blocklist, read_blocklist
from ldm.ingest.buckets import buckets_of
from ldm.ingest.card import card
from ldm.ingest.cluster import expect_distributor
from ldm.ingest.fetch import fetch
from ldm.ingest.listed import Chosen, Listed
from ldm.ingest.repack import repack
from ldm.ingest.report import expect_yields, line, report, write_hashes, write_skipped
from ldm.ingest.rows import read_list
from ldm.ingest.store import Store
from ldm.locks import held
from ldm.progress import say
from ldm.scenes.lists import ORIGIN
from ldm.scenes.origin import serving_scenes

FETCHED, LOCK, SCRATCH = "fetched", "lock", "scratch"

NOT_IN_BYTES = frozenset(
    {"timeout_s", "retries", "distributor", "processes", "threads"}
    | {"serve_scenes", "min_yield", "blocked"}
)
"""Settings of how pictures are fetched, not of what is written of them; a file is in the inputs."""
DISTRUSTED = frozenset({"blocked", "changed content"})
"""Reasons for which a picture that was fetched is not kept either."""


def ingest(config: Ingest, data: Path, out: Path, runs: Path, *, refetch: bool = False) -> None:
    """Fetch the pictures that ``data/train.csv`` and ``data/validation.csv`` name into ``out``.

    ``out`` becomes a directory of kind ``images``: ``SPLIT-NNNNN.tar``, or with aspect buckets
    ``SPLIT-WIDTHxHEIGHT-NNNNN.tar``, with one sample a kept row, ``report.json`` with counts,
    ``skipped.csv`` with every row left out and why, ``fetched.csv`` with the sha256 of each file
    that was downloaded, and ``card.md`` with its pictures. What img2dataset says stays in a hidden
    log beside ``out``.

    ``runs/fetched`` keeps what URLs gave (:mod:`ldm.ingest.store`), for the next run, or for this
    one if it is killed; ``out`` is what it would be without. With ``refetch`` every URL is asked.

    Raises :class:`UserError` when a list or the block list is unusable, Ray is to download and is
    not installed, the download fails, or less than ``config.min_yield`` of a list is kept; an
    earlier ``out`` then stays as it was. And while another process writes ``out``, or uses these
    ``runs``.
    """
    expect_distributor(config)
    listed = Listed()
    for split in SPLITS:
        listed.take(read_list(data / f"{split}.csv", split, config.max_caption), config)
    inputs = {f"{split}.csv": digest_file(data / f"{split}.csv") for split in SPLITS}
    blocked = Blocklist()
    if config.blocked is not None:
        blocked = read_blocklist(Path(config.blocked), config.near_duplicates)
        inputs["blocked"] = digest_file(Path(config.blocked))
    expect_yields(listed, data, config.min_yield)  # Before the downloads, which may take days.
    counts: dict[str, int] = {}
    with _opened(config, runs, refetch) as store:
        with writing(out, "images", config=_lasting(config), inputs=inputs, counts=counts) as fresh:
            _fetch_unknown(listed, store, out.parent / f".{out.name}.log", config)
            repack(listed, store, blocked, fresh, config)
            try:
                expect_yields(listed, data, config.min_yield)
            except UserError:
                store.forget_refusals()  # Or the next run, which asks what is unknown, ends alike.
                raise
            summary = report(listed.reasons())
            counts.update({split: part["kept"] for split, part in summary["lists"].items()})
            _describe(fresh, summary, listed, store, config)
        untrusted = (skip.row for skip in listed.left_out() if skip.reason in DISTRUSTED)
        asked = (row for _, row in listed.worth_asking("key"))
        store.finish(asked, untrusted, listed.resting())
        say(line(summary, store.asked, out))


def _describe(
    folder: Path, summary: Mapping[str, Any], listed: Listed, store: Store, config: Ingest
) -> None:
    """Write what is said of the shards beside them."""
    write_json(folder / "report.json", summary)
    write_skipped(folder / "skipped.csv", listed.left_out())
    first = ((row.url, store.first(row)) for _, row in listed.worth_asking("url"))
    write_hashes(folder / "fetched.csv", first)
    kept = ((row, store.fetched(row)) for row in listed.wanted())
    left_out = (skip.row for skip in listed.left_out())
    for name, content in card(summary, kept, left_out, buckets_of(config)).items():
        write_whole(folder / name, content)


@contextmanager
def _opened(config: Ingest, runs: Path, refetch: bool) -> Iterator[Store]:
    """The store, with nobody else at it."""
    folder = runs / FETCHED
    refusal = f"{runs}: another `ldm ingest` uses it; wait, or give another --runs"
    with held(folder / LOCK, refusal), Store(folder, basis_of(config), refetch=refetch) as store:
        yield store


def _fetch_unknown(listed: Listed, store: Store, log: Path, config: Ingest) -> None:
    """Ask each URL once that the store does not know; serve the embedded scenes if one is there."""
    unknown, embedded = array("q"), False
    for place, row in listed.worth_asking("key"):
        if not store.knows(row):
            unknown.append(place)
            embedded = embedded or row.url.startswith(f"{ORIGIN}/")
    if not unknown:
        return
    with (
        serving_scenes() if embedded and config.serve_scenes else nullcontext(),
        _scratch(store.path.parent) as scratch,
    ):
        fetch(Chosen(listed, unknown), scratch, log, config, store.take)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A folder that is gone after the block; no other's, to which killed ones may still write."""
    for left_by_a_kill in parent.glob(f"{SCRATCH}-*"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{SCRATCH}-", dir=parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def _lasting(config: Ingest) -> dict[str, Any]:
    """The settings that decide the output's bytes."""
    unused = {"quality": config.image_format == "png", "bucket_step": config.bucket_step is None}
    without = NOT_IN_BYTES | {key for key, is_unused in unused.items() if is_unused}
    return {key: value for key, value in config.as_dict().items() if key not in without}
