"""Fetched pictures to shards: each sample verified, without duplicates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ldm.config import Ingest
from ldm.ingest.blocklist import Blocklist
from ldm.ingest.buckets import Size, buckets_of, nearest
from ldm.ingest.cuts import CutShards, Sample
from ldm.ingest.duplicates import Kept
from ldm.ingest.perceptual import perceptual_hash
from ldm.ingest.pictures import checked
from ldm.ingest.ratings import ratings
from ldm.ingest.reasons import RefusedError
from ldm.ingest.results import Fetched
from ldm.ingest.rows import Row, Skip
from ldm.ingest.store import Store

Candidate = tuple[Row, Fetched, Size]
"""A row, its picture, and what that was cropped to."""


def repack(
    rows: Sequence[Row], store: Store, blocked: Blocklist, out: Path, config: Ingest
) -> tuple[list[tuple[Row, Fetched]], list[Skip]]:
    """Write ``SPLIT-*.tar`` of the rows' pictures, of which the store knows, into ``out``.

    With aspect buckets these are ``SPLIT-WIDTHxHEIGHT-*.tar``, each of samples of one size.

    Returns the rows that became samples, in their order, with their results, and the rows skipped.
    """
    kept: list[tuple[Row, Fetched]] = []
    skipped: list[Skip] = []
    sieve, sizes = Sieve(config, blocked), buckets_of(config)
    for split in dict.fromkeys(row.split for row in rows):
        found: list[Candidate] = []
        for row in (row for row in rows if row.split == split):
            try:
                found.append(_candidate(row, store.fetched(row), sizes))
            except RefusedError as refusal:
                skipped.append(Skip(row, refusal.reason, refusal.detail))
        shards = _shards(out, split, found, config)
        for row, fetched, size in found:
            sample: Sample | None = None
            try:
                sample = sieve.sample(row, fetched, size)
                kept.append((row, fetched))
            except RefusedError as refusal:
                skipped.append(Skip(row, refusal.reason, refusal.detail))
            shards[size].put(row.key, sample)
    return kept, skipped


def _candidate(row: Row, fetched: Fetched, sizes: Sequence[Size]) -> Candidate:
    return row, fetched, nearest(fetched.width, fetched.height, sizes)


def _shards(
    out: Path, split: str, candidates: Sequence[Candidate], config: Ingest
) -> dict[Size, CutShards]:
    """Those of each size."""
    shards = {}
    for size, prefix in _prefixes(split, config).items():
        keys = [row.key for row, _, own in candidates if own == size]
        shards[size] = CutShards(out, prefix, keys, config.samples_per_shard)
    return shards


def _prefixes(split: str, config: Ingest) -> dict[Size, str]:
    if config.bucket_step is None:
        return dict.fromkeys(buckets_of(config), split)
    return {size: f"{split}-{size[0]}x{size[1]}" for size in buckets_of(config)}


class Sieve:
    """Lets rows through as samples; remembers what it let through."""

    def __init__(self, config: Ingest, blocked: Blocklist) -> None:
        self.config, self.blocked = config, blocked
        self.kept = Kept(config.near_duplicates)

    def sample(self, row: Row, fetched: Fetched, size: Size) -> Sample:
        """The row's sample; raises :class:`RefusedError` when it is not kept.

        ``size``: what the picture must have been cropped to.
        """
        content = fetched.read()
        image = checked(content, self.config.image_format, size)
        sha256 = hashlib.sha256(content).hexdigest()
        look = None if self.config.near_duplicates is None else perceptual_hash(image)
        self.blocked.refuse((fetched.sha256, sha256), look)
        self.kept.add(row, sha256, look)
        about = _description(row, sha256, look, image.size)
        return lambda: {self.config.image_format: fetched.read(), "json": about}


def _description(row: Row, sha256: str, look: int | None, size: tuple[int, int]) -> bytes:
    """The sample's ``json``: hashes and size are of the picture beside it."""
    value: dict[str, str | float] = {
        "caption": row.caption,
        "url": row.url,
        "sha256": sha256,
        "width": size[0],
        "height": size[1],
    }
    if look is not None:
        value["phash"] = f"{look:016x}"
    return json.dumps(value | ratings(row.rated), ensure_ascii=False).encode()
