"""The data side: ingest over stock img2dataset, encode over the bare encoders, the loader over
``cat``, memory from 1,000 to 100,000 samples, and bytes a sample.

``--small`` takes a minute and shows that it works; its ratios say nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, product
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from bench import SMALL, encode
from bench.compare import compare
from bench.peak import peak
from bench.synthetic import caption, origin, write_images, write_latents
from ldm.artifacts import manifest_of
from ldm.cache import LatentCache
from ldm.config import Ingest
from ldm.latents import IDS, STATES, TEXT_MEMBERS, TEXTS, SampleReader, from_npy
from ldm.shards import ShardReader
from ldm.train.data import TrainingBatches

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 1 if SMALL else 5
BATCH = 64
FEW, MANY = (100, 1_000) if SMALL else (1_000, 100_000)


def main() -> None:
    """Print all tables."""
    ingest_speed()
    encode.speed()
    load_speed()
    memory()
    cache_size(Path("artifacts/latents"))


def ingest_speed() -> None:
    """The whole of ``ldm ingest``, guards, verification and card, over ``img2dataset.download``."""
    rows, side = 200 if SMALL else 4000, 256
    settings = Ingest()
    with origin(side) as url, tempfile.TemporaryDirectory() as folder:
        lists = write_lists(Path(folder), url, rows)
        stock = {
            "url_list": str(lists / "train.csv"),
            "input_format": "csv",
            "url_col": "url",
            "caption_col": "caption",
            "output_folder": "out",
            "output_format": "webdataset",
            "resize_mode": "center_crop",
            "image_size": settings.image_size,
            "encode_format": settings.image_format,
            "encode_quality": 6,
            "number_sample_per_shard": max(100, rows // 8),
            "processes_count": settings.processes,
            "thread_count": settings.threads,
            "timeout": settings.timeout_s,
            "retries": settings.retries,
        }
        code = f"import img2dataset; img2dataset.download(**{stock!r})"
        theirs, ours = [sys.executable, "-c", code], ldm("ingest", data=lists)
        compare(
            f"ingest, {rows} pictures of {side} pixels from loopback: pictures a second",
            ("img2dataset", lambda: run_aside(theirs, made_by_img2dataset, rows)),
            ("ldm ingest", lambda: run_aside(ours, made_by_ldm, rows)),
            rows,
            ROUNDS,
        )


def write_lists(folder: Path, url: str, rows: int) -> Path:
    """Lists of so many training rows, and of one to validate on."""
    for name, numbers in (("train", range(rows)), ("validation", range(rows, rows + 1))):
        lines = (f"{url}/{number},{caption(number)}\n" for number in numbers)
        (folder / f"{name}.csv").write_text("url,caption\n" + "".join(lines))
    return folder


def ldm(stage: str, **paths: Path) -> list[str]:
    """The command of a stage with the settings of ``tiny``."""
    options = [f"--{name}={path}" for name, path in paths.items()]
    return [sys.executable, "-m", "ldm.cli", stage, "--params", "tiny", *options]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "NO_ALBUMENTATIONS_UPDATE": "1"}


def run_aside(command: list[str], made: Callable[[Path], int], samples: int) -> None:
    """Run it quietly in a new folder, where it must have made so many samples."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
        assert made(Path(folder)) == samples


def made_by_img2dataset(folder: Path) -> int:
    tables = folder.glob("out/*_stats.json")
    return sum(json.loads(table.read_text())["successes"] for table in tables)


def made_by_ldm(folder: Path) -> int:
    return json.loads((folder / "artifacts/images/manifest.json").read_text())["counts"]["train"]


def load_speed() -> None:
    """An epoch, shuffled, over ``cat`` of the same files: what is read, then whole batches."""
    samples = 2 * BATCH if SMALL else 32 * BATCH
    shapes = {"tiny": ((8, 8, 8), (40, 128), "float32"), "SD": ((8, 64, 64), (77, 768), "float16")}
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            write_latents(Path(folder), samples, *shape)
            os.sync()
            files = sorted(Path(folder).glob("*.tar"))
            size = sum(path.stat().st_size for path in files) / 2**20
            ways = {
                "moments and text": reading(Path(folder)),
                "batches, 2 workers": batches(Path(folder), 2),
            }
            for (way, load), cold in product(ways.items(), (False, True)):
                where = "disk" if cold else "memory"
                compare(
                    f"load, {name}, {samples} samples from {where}: MiB a second",
                    ("cat", partial(after, cold, files, partial(concatenate, files))),
                    (way, partial(after, cold, files, load)),
                    size,
                    ROUNDS,
                )


def after(cold: bool, files: Sequence[Path], run: Callable[[], None]) -> None:
    """Run; if ``cold``, have the system read the files from disk."""
    if cold:
        for path in files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    run()


def concatenate(files: Sequence[Path]) -> None:
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)


def reading(latents: Path) -> Callable[[], None]:
    """A function that reads all samples as they are in the cache, shuffled, a batch at a time."""
    cache = LatentCache(latents, "train")
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(0)).split(BATCH)

    def run() -> None:
        for samples in map(torch.Tensor.tolist, order):
            cache.expect(samples)
            cache.moments(samples)
            cache.texts(samples)

    return run


def batches(latents: Path, workers: int) -> Callable[[], None]:
    """A function that makes the batches of the next epoch as the trainer does: with noise."""
    cache = LatentCache(latents, "train")
    made = TrainingBatches(cache, seed=0, batch_size=BATCH, timesteps=1000, caption_dropout=0.0)
    epochs, size = count(), len(cache) // BATCH

    def run() -> None:
        first = next(epochs) * size
        for _ in DataLoader(
            made, sampler=range(first, first + size), batch_size=None, num_workers=workers
        ):
            pass

    return run


def memory() -> None:
    """Peak resident memory of the largest process of a stage, few samples and many."""
    print(f"\npeak memory in MiB\n{'':12}{FEW:>12,}{MANY:>12,}{'ratio':>9}")
    for stage in (memory_of_ingest, memory_of_encode, memory_of_load):
        few, many = stage(FEW), stage(MANY)
        name = stage.__name__.removeprefix("memory_of_")
        print(f"{name:12}{few:12.1f}{many:12.1f}{many / few:9.3f}", flush=True)


def memory_of_ingest(samples: int) -> float:
    with origin(64) as url, tempfile.TemporaryDirectory() as folder:
        lists = write_lists(Path(folder), url, samples)
        return peak(ldm("ingest", data=lists), folder)


def memory_of_encode(samples: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        write_images(images, samples, 16)
        return peak(ldm("encode", images=images), folder)


def memory_of_load(samples: int) -> float:
    """An epoch of batches."""
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder) / "latents", samples, (8, 2, 2), (4, 4), "float32")
        code = "import sys, bench.data as data; data.batches(data.Path(sys.argv[1]), workers=0)()"
        return peak([sys.executable, "-c", code, f"{folder}/latents"], folder)


def cache_size(latents: Path) -> None:
    """Bytes a sample and a caption, beside their arrays' alone; what one text a caption saves."""
    if (made := manifest_of(latents)) is None:
        print(f"\nno {latents}: run `make demo` for the bytes of its cache")
        return
    splits = [SampleReader(made, split) for split in ("train", "validation")]
    texts = ShardReader(latents, TEXTS, TEXT_MEMBERS)
    columns = "".join(f"{name:>12}" for name in ("pieces", "bytes each", "arrays", "tar, json"))
    print(f"\nbytes of {latents}\n{'':12}{columns}")
    samples = sum(len(reader) for reader in splits)
    of_sample = row("samples", [(reader, reader.arrays) for reader in splits])
    of_text = row("captions", [(texts, (STATES, IDS))])
    once, each = len(texts) * of_text, samples * of_text
    print(
        f"one text a caption: {len(texts):,} for {samples:,} samples, {once / 2**20:.1f} MiB where "
        f"one a sample were {each / 2**20:.1f}: {1 - once / each:.1%} saved\n"
        f"the whole cache: {of_sample + once / samples:,.0f} bytes a sample"
    )


def row(name: str, readers: Sequence[tuple[ShardReader, Sequence[str]]]) -> float:
    """Print a row, of readers and the arrays that each piece there has; bytes of files by piece."""
    pieces = sum(len(reader) for reader, _ in readers)
    each = sum(path.stat().st_size for reader, _ in readers for path in reader.paths) / pieces
    own = sum(len(reader) * bytes_of_arrays(reader, arrays) for reader, arrays in readers) / pieces
    print(f"{name:12}{pieces:12,}{each:12,.0f}{own:12,.0f}{each - own:12,.0f}")
    return each


def bytes_of_arrays(reader: ShardReader, arrays: Sequence[str]) -> int:
    """Of the first piece; all have as many."""
    first = next(iter(reader))
    return sum(from_npy(reader.read(first, array)).nbytes for array in arrays)
