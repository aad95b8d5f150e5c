"""Fetched pictures to shards: each sample verified, without duplicates."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from ldm.config import Ingest
from ldm.image_shards import ABOUT
from ldm.ingest.blocklist import Blocklist
from ldm.ingest.buckets import Size, buckets_of, nearest
from ldm.ingest.cuts import CutShards, Sample
from ldm.ingest.duplicates import Kept
from ldm.ingest.listed import Listed
from ldm.ingest.perceptual import perceptual_hash
from ldm.ingest.pictures import checked
from ldm.ingest.ratings import ratings
from ldm.ingest.reasons import RefusedError
from ldm.ingest.results import Fetched
from ldm.ingest.rows import Row
from ldm.ingest.store import Store

KEY = np.dtype("S32")
"""A sample's key, in less memory than as a string."""


def repack(listed: Listed, store: Store, blocked: Blocklist, out: Path, config: Ingest) -> None:
    """Write ``SPLIT-*.tar`` of the wanted rows' pictures, of which the store knows, into ``out``.

    With aspect buckets these are ``SPLIT-WIDTHxHEIGHT-*.tar``, each of samples of one size. Rows
    that do not become samples are left out from now on.
    """
    sieve, sizes = Sieve(config, blocked), buckets_of(config)
    for split in listed.reasons():
        shards = _shards(out, split, listed, store, config)
        for row in listed.wanted(split):
            fetched = store.fetched(row)
            size = nearest(fetched.width, fetched.height, sizes)
            sample: Sample | None = None
            try:
                sample = sieve.sample(row, fetched, size)
            except RefusedError as refusal:
                listed.leave_out(row, refusal)
            shards[size].put(row.key, sample)


def _shards(
    out: Path, split: str, listed: Listed, store: Store, config: Ingest
) -> dict[Size, CutShards]:
    """Those of each size, for the rows whose pictures there are; the others are left out."""
    prefixes, sizes = _prefixes(split, config), buckets_of(config)
    keys = {size: bytearray() for size in sizes}
    for row in listed.wanted(split):
        try:
            fetched = store.fetched(row)
        except RefusedError as refusal:
            listed.leave_out(row, refusal)
            continue
        keys[nearest(fetched.width, fetched.height, sizes)] += row.key.encode()
    return {
        size: CutShards(out, prefix, np.frombuffer(keys[size], KEY), config.samples_per_shard)
        for size, prefix in prefixes.items()
    }


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
        return lambda: {self.config.image_format: fetched.read(), ABOUT: about}


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
