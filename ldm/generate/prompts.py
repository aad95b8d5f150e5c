"""Files of prompts, read row by row: txt, csv, jsonl and parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import Sampling
from ldm.errors import UserError
from ldm.params import with_changes

ROWS_AT_ONCE = 1000
LARGEST = 2**62
"""Of numbers in a row; a seed may be counted up from here."""
SAMPLING_COLUMNS = ("steps", "guidance", "sampler")
COLUMNS = ("prompt", "negative", "seed", "height", "width", *SAMPLING_COLUMNS)


@dataclass(frozen=True)
class Wish:
    """What a row asks for; ``extra`` are its other columns, carried to the table of pictures."""

    prompt: str
    negative: str
    seed: int
    height: int | None
    width: int | None
    sampling: Sampling
    extra: dict[str, Any]


def rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of a file, none where one cannot be read; a few at a time are held in memory.

    Raises :class:`UserError` naming the file when it is not there or of another kind.
    """
    readers = {".txt": _lines, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown kind of prompts file; use {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give --prompts a {', '.join(readers)} file")
    try:
        yield from readers[path.suffix](path)
    except (OSError, ValueError, csv.Error) as error:  # Arrow's errors are among these.
        if isinstance(error, UserError):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read ({reason}); is it UTF-8, and whole?") from error


def wish(row: dict[str, Any] | None, default: Wish) -> Wish:
    """A row in full: what it leaves open is ``default``'s. Raises :class:`UserError`."""
    if row is None:
        raise UserError("cannot be read")
    given = {key: value for key, value in row.items() if value is not None and value != ""}
    prompt = given.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("has no prompt")
    try:
        json.dumps([row], ensure_ascii=False, default=str).encode()
    except ValueError as error:
        raise UserError("is no Unicode text") from error
    changes = {key: given[key] for key in SAMPLING_COLUMNS if key in given}
    return Wish(
        prompt=prompt,
        negative=str(given.get("negative", default.negative)),
        seed=_whole(given, "seed", default.seed) or 0,
        height=_whole(given, "height", default.height),
        width=_whole(given, "width", default.width),
        sampling=with_changes(default.sampling, changes, "row") if changes else default.sampling,
        extra={key: value for key, value in given.items() if key not in COLUMNS},
    )


def _whole(given: dict[str, Any], name: str, default: int | None) -> int | None:
    value = given.get(name, default)
    if value is None:
        return None
    try:
        # Tables write 3.0 for 3 as soon as one row has none; a float of a long seed would round it.
        found = int(value) if str(value).isdigit() else float(value)
        whole = int(found)
    except (TypeError, ValueError, OverflowError):
        found, whole = 0, -1
    if whole != found or not 0 <= whole <= LARGEST:
        raise UserError(f"{name} {str(value)[:40]!r} is no whole number from 0 to {LARGEST}")
    return whole


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                yield {"prompt": line.strip()}


def _csv(path: Path) -> Iterator[dict[str, Any] | None]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        _distinct(path, table.fieldnames or [])
        for row in table:
            # More fields than the header has.
            yield None if None in row else dict(row)


def _jsonl(path: Path) -> Iterator[dict[str, Any] | None]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            yield found if isinstance(found, dict) else None


def _parquet(path: Path) -> Iterator[dict[str, Any] | None]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _distinct(path, file.schema_arrow.names)
        for batch in file.iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _distinct(path: Path, columns: Sequence[str]) -> None:
    for name in columns:
        if list(columns).count(name) > 1:
            raise UserError(f"{path}: has the column {name!r} twice; rename one")
