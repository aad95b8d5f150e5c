"""img2dataset's shards to ours: each sample verified, without duplicates, in the list's order."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.config import Ingest
from ldm.ingest.duplicates import Kept
from ldm.ingest.fetch import POSITION
from ldm.ingest.perceptual import perceptual_hash
from ldm.ingest.pictures import checked
from ldm.ingest.reasons import RefusedError, read_message
from ldm.ingest.rows import Row, Skip
from ldm.shards import ShardWriter


@dataclass(frozen=True)
class Fetched:
    """What became of one row: where the picture's bytes are, or img2dataset's error message."""

    message: str
    tar: Path | None = None
    offset: int = 0
    size: int = 0

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
        pictures = _pictures(table_path.with_suffix(".tar"), image_format)
        table = pq.read_table(table_path, columns=[POSITION, "key", "error_message"])
        for line in table.to_pylist():
            message = line["error_message"] or ""
            found[line[POSITION]] = pictures.get(line["key"]) or Fetched(message)
    return found


def _pictures(path: Path, image_format: str) -> dict[str, Fetched]:
    with tarfile.open(path, "r:") as tar:
        return {
            member.name.partition(".")[0]: Fetched("", path, member.offset_data, member.size)
            for member in tar
            if member.name.endswith(f".{image_format}")
        }


def repack(
    rows: Sequence[Row], fetched: Mapping[int, Fetched], out: Path, config: Ingest
) -> tuple[dict[str, int], list[Skip]]:
    """Write ``SPLIT-*.tar`` into ``out``; ``fetched`` maps indices of ``rows`` to results.

    Returns the samples written by split and the rows skipped.
    """
    written: dict[str, int] = {}
    skipped: list[Skip] = []
    kept = Kept(config.near_duplicates)
    for split in dict.fromkeys(row.split for row in rows):
        own = ((row, fetched.get(at)) for at, row in enumerate(rows) if row.split == split)
        with ShardWriter(out, split, config.samples_per_shard) as writer:
            skipped += _repack_list(own, kept, writer, config)
            written[split] = writer.samples
    return written, skipped


def _repack_list(
    rows: Iterable[tuple[Row, Fetched | None]], kept: Kept, writer: ShardWriter, config: Ingest
) -> list[Skip]:
    skipped: list[Skip] = []
    for row, result in rows:
        try:
            sample = _sample(row, result, kept, config)
        except RefusedError as refusal:
            skipped.append(Skip(row, refusal.reason, refusal.detail))
        else:
            writer.write(f"{row.number:08d}", sample)
    return skipped


def _sample(row: Row, result: Fetched | None, kept: Kept, config: Ingest) -> dict[str, bytes]:
    """The row's members by extension; raises :class:`RefusedError` when it is not to be kept."""
    content = _content(result)
    image = checked(content, config.image_format, config.image_size)
    sha256 = hashlib.sha256(content)
    look = None if config.near_duplicates is None else perceptual_hash(image)
    kept.add(row, sha256.digest(), look)
    about = _description(row, sha256.hexdigest(), config)
    return {config.image_format: content, "json": about}


def _content(result: Fetched | None) -> bytes:
    if result is None:
        raise RefusedError("no result", "img2dataset said nothing of this row; its log may")
    if result.tar is None:
        raise RefusedError(*read_message(result.message))
    return result.read()


def _description(row: Row, sha256: str, config: Ingest) -> bytes:
    """The sample's ``json``: sha256 and size are of the picture beside it."""
    value = {
        "caption": row.caption,
        "url": row.url,
        "row": row.number,
        "sha256": sha256,
        "width": config.image_size,
        "height": config.image_size,
    }
    return json.dumps(value, ensure_ascii=False).encode()
