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
from ldm.ingest.fetch import POSITION
from ldm.ingest.pictures import check
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
    kept: dict[str, int] = {}
    skipped: list[Skip] = []
    for split in dict.fromkeys(row.split for row in rows):
        own = ((row, fetched.get(at)) for at, row in enumerate(rows) if row.split == split)
        with ShardWriter(out, split, config.samples_per_shard) as writer:
            skipped += _repack_list(own, writer, config)
            kept[split] = writer.samples
    return kept, skipped


def _repack_list(
    rows: Iterable[tuple[Row, Fetched | None]], writer: ShardWriter, config: Ingest
) -> list[Skip]:
    skipped: list[Skip] = []
    first: dict[tuple[str, str], int] = {}
    for row, result in rows:
        try:
            content = _verified(result, config)
        except RefusedError as refusal:
            skipped.append(Skip(row, refusal.reason, refusal.detail))
            continue
        sha256 = hashlib.sha256(content).hexdigest()
        earlier = first.setdefault((sha256, row.caption), row.number)
        if earlier != row.number:
            skipped.append(Skip(row, "duplicate", f"same picture and caption as row {earlier}"))
            continue
        members = {config.image_format: content, "json": _description(row, sha256, config)}
        writer.write(f"{row.number:08d}", members)
    return skipped


def _verified(result: Fetched | None, config: Ingest) -> bytes:
    if result is None:
        raise RefusedError("no result", "img2dataset said nothing of this row; its log may")
    if result.tar is None:
        raise RefusedError(*read_message(result.message))
    content = result.read()
    check(content, config.image_format, config.image_size)
    return content


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
