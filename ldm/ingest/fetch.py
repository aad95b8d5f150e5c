"""Rows to pictures by img2dataset: run as a child process, watched, its exit code never trusted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ldm.config import Ingest
from ldm.errors import UserError
from ldm.ingest.buckets import buckets_of
from ldm.ingest.guard import Guard
from ldm.ingest.pictures import Rules
from ldm.ingest.results import POSITION, Result, results
from ldm.ingest.rows import Row
from ldm.progress import progress

SHARDS_A_PROCESS = 4
"""img2dataset starts a process afresh after five shards, which costs seconds."""
SHARD_ROWS = (100, 2000)
"""Fewest and most rows in a shard of img2dataset's."""
LIST_SHARDS = 16
"""Shards in each file of its list, of which it holds one in memory at a time."""

POLL_S = 0.2
PATIENCE_S = 300
"""How long start-up may take, and how much longer than its timeouts allow a shard may."""

Take = Callable[[Iterable[tuple[Row, Result]]], None]
"""What is called with a finished shard's rows and their results."""


@dataclass(frozen=True)
class Job:
    """One run of img2dataset: ``rows`` in shards of ``shard_rows`` into ``folder``."""

    rows: int
    shard_rows: int
    folder: Path
    log: Path
    patience_s: float
    """Longest time without a finished shard."""

    @property
    def shards(self) -> int:
        """How many shards that makes."""
        return math.ceil(self.rows / self.shard_rows)

    def rows_in(self, shard: str) -> int:
        """The last shard has what is left over."""
        return min(self.shard_rows, self.rows - int(shard) * self.shard_rows)

    def finished(self) -> set[str]:
        """Names, numbers all, of the finished shards: their statistics are written last."""
        return {path.name.partition("_")[0] for path in self.folder.glob("*_stats.json")}


def fetch(rows: Sequence[Row], scratch: Path, log: Path, config: Ingest, take: Take) -> None:
    """Download, crop and re-encode the rows' pictures; ``take`` gets them as shards are finished.

    Shows a progress bar. img2dataset's own words go to ``log``. Raises :class:`UserError` naming
    the log when it fails, stands still or leaves a shard out.
    """
    job = _plan(len(rows), scratch / "shards", log, config)
    lists = scratch / "lists"
    _write_lists(lists, rows, LIST_SHARDS * job.shard_rows)
    with (
        _running(_settings(lists, job, config), log) as child,
        progress((), "ingest", len(rows), "rows") as bar,
    ):
        for shard in watch(child, job):
            found = results(job.folder / shard, config.image_format)
            take((rows[position], result) for position, result in found)
            (job.folder / f"{shard}.tar").unlink()
            bar.update(job.rows_in(shard))


def _plan(rows: int, folder: Path, log: Path, config: Ingest) -> Job:
    fewest, most = SHARD_ROWS
    even = math.ceil(rows / (config.processes * SHARDS_A_PROCESS))
    shard_rows = min(max(even, fewest), most)
    attempts_s = config.timeout_s * (config.retries + 1)
    patience_s = PATIENCE_S + attempts_s * math.ceil(shard_rows / config.threads)
    return Job(rows, shard_rows, folder, log, patience_s)


def _write_lists(folder: Path, rows: Sequence[Row], most: int) -> None:
    """So many rows a file. Captions stay here: img2dataset turns some of them into others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    urls = (row.plain_url for row in rows)
    for first in range(0, len(rows), most):
        some = list(islice(urls, most))
        table = pa.table({"url": some, POSITION: range(first, first + len(some))})
        pq.write_table(table, folder / f"{first // most:08d}.parquet")


def _settings(lists: Path, job: Job, config: Ingest) -> dict[str, Any]:
    """Arguments of ``img2dataset.download``."""
    return {
        "url_list": str(lists),
        "input_format": "parquet",
        "save_additional_columns": [POSITION],
        "output_folder": str(job.folder),
        "output_format": "webdataset",
        "incremental_mode": "incremental",  # "overwrite" deletes its own temporary folder
        "compute_hash": "sha256",
        "extract_exif": False,
        "number_sample_per_shard": job.shard_rows,
        "distributor": config.distributor,
        "processes_count": min(config.processes, job.shards),
        "thread_count": config.threads,
        "guard": asdict(guard_of(config)),
        "enable_wandb": False,
        **making(config),
    }


def making(config: Ingest) -> dict[str, Any]:
    """Those arguments that decide what becomes of a file."""
    return {
        "image_size": config.image_size,
        "resize_mode": "center_crop",
        "resize_only_if_bigger": False,
        "encode_format": config.image_format,
        "encode_quality": 6 if config.image_format == "png" else config.quality,
        "rules": asdict(rules_of(config)),
    }


def guard_of(config: Ingest) -> Guard:
    """The rules of the downloads."""
    return Guard(
        config.user_agent,
        config.allow_addresses,
        config.timeout_s,
        config.max_bytes,
        config.retries,
    )


def rules_of(config: Ingest) -> Rules:
    """The rules of the pictures."""
    return Rules(
        tuple(name.upper() for name in config.formats),
        config.max_pixels,
        config.min_side,
        config.max_aspect,
        config.background,
        config.animations,
        buckets_of(config),
    )


@contextmanager
def _running(settings: dict[str, Any], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """img2dataset with its workers, in a session of their own that ends with the block."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "ldm.ingest.download"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        ) as child,
    ):
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(settings).encode() + b"\n")
            child.stdin.flush()
            yield child
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


def watch(child: subprocess.Popen[bytes], job: Job) -> Iterator[str]:
    """Yield the names of shards as they are finished, until the child ends.

    Raises :class:`UserError` when it fails, stands still or leaves a shard out.
    """
    done: set[str] = set()
    last = time.monotonic()
    while True:
        ended = child.poll() is not None
        for shard in sorted(job.finished() - done):
            done.add(shard)
            last = time.monotonic()
            yield shard
        if ended:
            break
        if time.monotonic() - last > job.patience_s:
            raise UserError(
                f"img2dataset: no progress for {job.patience_s:.0f} s; read {job.log}, try again"
            )
        time.sleep(POLL_S)
    missing = job.shards - len(done)
    if child.returncode or missing:
        raise UserError(
            f"img2dataset: ended with status {child.returncode}, {missing} of {job.shards} shards "
            f"missing; {job.log} says why"
        )
