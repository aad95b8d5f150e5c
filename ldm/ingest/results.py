"""What URLs gave: pictures and refusals, as img2dataset's shards hold them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ldm.ingest.reasons import RefusedError, read_message

POSITION = "position"
"""Column of img2dataset's tables: index into the rows that were asked for."""
COLUMNS = [POSITION, "key", "error_message", "sha256", "original_width", "original_height"]
"""What is read of them."""


@dataclass(frozen=True)
class Fetched:
    """A picture that a URL gave, cropped and encoded anew."""

    sha256: str
    """Of the file as it was downloaded, in hexadecimal."""
    width: int
    height: int
    """In pixels, before the crop."""
    read: Callable[[], bytes] = field(repr=False, compare=False)
    """The picture's bytes."""


Result = Fetched | RefusedError


def results(shard: Path, image_format: str) -> Iterator[tuple[int, Result]]:
    """Position and result of each row of a shard, whose files are ``shard`` with an extension."""
    import pyarrow.parquet as pq

    tar = shard.with_suffix(".tar")
    members = _members(tar, image_format)
    for line in pq.read_table(shard.with_suffix(".parquet"), columns=COLUMNS).to_pylist():
        yield line[POSITION], _result(line, tar, members.get(line["key"]))


def _members(path: Path, image_format: str) -> dict[str, tarfile.TarInfo]:
    """The pictures by key."""
    with tarfile.open(path, "r:") as tar:
        return {
            member.name.partition(".")[0]: member
            for member in tar
            if member.name.endswith(f".{image_format}")
        }


def _result(line: Mapping[str, Any], tar: Path, member: tarfile.TarInfo | None) -> Result:
    if member is None:
        return RefusedError(*read_message(line["error_message"] or ""))
    read = partial(_read, tar, member.offset_data, member.size)
    return Fetched(line["sha256"], line["original_width"], line["original_height"], read)


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), size, offset)
