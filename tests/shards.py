"""Shards as the stages write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ldm.batches import parts
from ldm.shards import writing_shard


def write_shards(
    folder: Path, prefix: str, samples: Iterable[tuple[str, Mapping[str, bytes]]], a_shard: int
) -> None:
    """Into ``PREFIX-00000.tar``, ``PREFIX-00001.tar``, ..., so many samples each."""
    for number, part in enumerate(parts(samples, a_shard)):
        with writing_shard(folder / f"{prefix}-{number:05d}.tar") as append:
            for key, members in part:
                append(key, members)
