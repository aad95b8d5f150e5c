"""img2dataset's shards to ours: each sample verified, without duplicates, in the list's order."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import Ingest
from ldm.ingest.blocklist import Blocklist
from ldm.ingest.buckets import Size, buckets_of, nearest
from ldm.ingest.duplicates import Kept
from ldm.ingest.fetch import POSITION
from ldm.ingest.perceptual import perceptual_hash
from ldm.ingest.pictures import checked
from ldm.ingest.ratings import ratings
from ldm.ingest.reasons import RefusedError, read_message
from ldm.ingest.rows import Row, Skip
from ldm.shards import ShardWriter

COLUMNS = [POSITION, "key", "error_message", "sha256", "original_width", "original_height"]
"""What is read of img2dataset's tables."""


@dataclass(frozen=True)
class Fetched:
    """What became of one row: where the picture's bytes are, or img2dataset's error message."""

    message: str
    tar: Path | None = None
    offset: int = 0
    size: int = 0
    sha256: str = ""
    """Of the file as it was downloaded, in hexadecimal."""
    width: int = 0
    height: int = 0
    """In pixels, before the crop."""

    def read(self) -> bytes:
        """The picture's bytes."""
        assert self.tar is not None
        with self.tar.open("rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


def results(folder: Path, image_format: str) -> dict[int, Fetched]:
    """Read all of img2dataset's tables and tar headers: position of the row to its result."""
    import pyarrow.parquet as pq

    found: dict[int, Fetched] = {}
    for table_path in sorted(folder.glob("*.parquet")):
        tar = table_path.with_suffix(".tar")
        members = _members(tar, image_format)
        for line in pq.read_table(table_path, columns=COLUMNS).to_pylist():
            found[line[POSITION]] = _fetched(line, tar, members.get(line["key"]))
    return found


def _members(path: Path, image_format: str) -> dict[str, tarfile.TarInfo]:
    """The pictures by key."""
    with tarfile.open(path, "r:") as tar:
        return {
            member.name.partition(".")[0]: member
            for member in tar
            if member.name.endswith(f".{image_format}")
        }


def _fetched(line: Mapping[str, Any], tar: Path, member: tarfile.TarInfo | None) -> Fetched:
    if member is None:
        return Fetched(line["error_message"] or "")
    size = line["original_width"], line["original_height"]
    return Fetched("", tar, member.offset_data, member.size, line["sha256"], *size)


def repack(
    rows: Sequence[Row],
    fetched: Mapping[int, Fetched],
    blocked: Blocklist,
    out: Path,
    config: Ingest,
) -> tuple[list[tuple[Row, Fetched]], list[Skip]]:
    """Write ``SPLIT-*.tar`` into ``out``; ``fetched`` maps indices of ``rows`` to results.

    With aspect buckets these are ``SPLIT-WIDTHxHEIGHT-*.tar``, each of samples of one size.

    Returns the rows that became samples, in their order, with their results, and the rows skipped.
    """
    kept: list[tuple[Row, Fetched]] = []
    skipped: list[Skip] = []
    sieve = Sieve(config, blocked)
    for split in dict.fromkeys(row.split for row in rows):
        with _writers(out, split, config) as writers:
            for at, row in enumerate(rows):
                if row.split != split:
                    continue
                try:
                    result = _expect_picture(fetched.get(at))
                    size = nearest(result.width, result.height, list(writers))
                    writers[size].write(f"{row.number:08d}", sieve.sample(row, result, size))
                except RefusedError as refusal:
                    skipped.append(Skip(row, refusal.reason, refusal.detail))
                else:
                    kept.append((row, result))
    return kept, skipped


@contextmanager
def _writers(out: Path, split: str, config: Ingest) -> Iterator[dict[Size, ShardWriter]]:
    """For samples of each size."""
    with ExitStack() as stack:
        yield {
            size: stack.enter_context(ShardWriter(out, prefix, config.samples_per_shard))
            for size, prefix in _prefixes(split, config).items()
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

    def sample(self, row: Row, fetched: Fetched, size: Size) -> dict[str, bytes]:
        """The row's members by extension; raises :class:`RefusedError` when it is not kept.

        ``size``: what the picture must have been cropped to.
        """
        content = fetched.read()
        image = checked(content, self.config.image_format, size)
        sha256 = hashlib.sha256(content).hexdigest()
        look = None if self.config.near_duplicates is None else perceptual_hash(image)
        self.blocked.refuse((fetched.sha256, sha256), look)
        self.kept.add(row, sha256, look)
        about = _description(row, sha256, look, image.size)
        return {self.config.image_format: content, "json": about}


def _expect_picture(result: Fetched | None) -> Fetched:
    if result is None:
        raise RefusedError("no result", "img2dataset said nothing of this row; its log may")
    if result.tar is None:
        raise RefusedError(*read_message(result.message))
    return result


def _description(row: Row, sha256: str, look: int | None, size: tuple[int, int]) -> bytes:
    """The sample's ``json``: hashes and size are of the picture beside it."""
    value: dict[str, str | float] = {
        "caption": row.caption,
        "url": row.url,
        "row": row.number,
        "sha256": sha256,
        "width": size[0],
        "height": size[1],
    }
    if look is not None:
        value["phash"] = f"{look:016x}"
    return json.dumps(value | ratings(row.rated), ensure_ascii=False).encode()
