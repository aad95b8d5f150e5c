"""What is left of memory, what is kept, and that a training asks for no more than it needs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
import torch

import ldm.memory
import ldm.saver
from ldm.artifacts import opening
from ldm.checkpoint import Checkpoint, newest, save
from ldm.config import Encode, FirstStage, Pretrained
from ldm.encode.stage import encode
from ldm.first_stage.stage import first_stage
from ldm.memory import available
from ldm.models import Source
from ldm.report.stage import _reconstructions
from ldm.sampling import Painter
from ldm.saver import Saver
from ldm.train.data import Batch
from ldm.train.objective import Objective
from tests.test_checkpoint import at
from tests.test_train import run_here

MIB = 2**20


@pytest.mark.parametrize("limit", [None, "max"])
def test_without_a_limit_it_is_the_machines(tmp_path: Path, limit: str | None) -> None:
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    assert available(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(("used", "left"), [(50, 70), (130, 0)])
def test_a_limit_counts_what_is_used_but_for_cached_files(
    tmp_path: Path, used: int, left: int
) -> None:
    (tmp_path / "memory.max").write_text(f"{100 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{used * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {20 * MIB}\nactive_file 9\n")
    assert available(tmp_path) == left * MIB


@pytest.mark.parametrize(("last", "room"), [(True, 10.0), (False, 1.9)])
def test_without_a_copy_a_checkpoint_is_on_disk_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool, room: float
) -> None:
    state = at(10)
    monkeypatch.setattr(ldm.saver, "available", lambda: room * state.size)
    monkeypatch.delattr(Checkpoint, "copied")
    with Saver(tmp_path, keep=1) as saver:
        saver.save(state, last=last)
        found = newest(tmp_path)
        assert found is not None and torch.equal(found.ema["weight"], state.ema["weight"])


def test_weights_of_any_memory_layout_are_saved(tmp_path: Path) -> None:
    weight = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    save(tmp_path, Checkpoint(1, {"weight": weight}, {}, {}), keep=1)
    found = newest(tmp_path)
    assert found is not None and torch.equal(found.weights["weight"], weight)


def test_a_training_copies_its_state_only_where_it_goes_on(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, copied = [], Checkpoint.copied

    def noted(state: Checkpoint) -> Checkpoint:
        copies.append(state.step)
        return copied(state)

    monkeypatch.setattr(Checkpoint, "copied", noted)
    run_here(pipeline, latents, tmp_path, checkpoint_every=6)
    assert copies == [6]
    assert list(tmp_path.glob("runs/*/step-00000012"))


def test_validation_takes_no_larger_batches_than_training(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, loss = set(), Objective.loss

    def noted(objective: Objective, denoiser: torch.nn.Module, batch: Batch) -> torch.Tensor:
        sizes.add(len(batch.latents))
        return loss(objective, denoiser, batch)

    monkeypatch.setattr(Objective, "loss", noted)
    run_here(pipeline, latents, tmp_path, accumulation=4)
    assert sizes == {2}


# What a process keeps

MAPPED = """
import ctypes, sys, torch
import ldm.memory

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks".split()]
    _fields_ += [(f"other{number}", ctypes.c_size_t) for number in range(6)]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
library.malloc.restype = ctypes.c_void_p
getattr(ldm.memory, sys.argv[1])(torch.device(sys.argv[2]))
before = library.mallinfo2().hblks
for mib in (16, 512):
    library.malloc(ctypes.c_size_t(mib * 2**20))
print(library.mallinfo2().hblks - before)
"""
"""How many of a piece of 16 and one of 512 MiB are the system's, and go back to it at once."""


@pytest.mark.parametrize(
    ("name", "device", "mapped"),
    [
        ("keep_memory", "cuda", 2),
        ("keep_memory", "cpu", 1),
        ("keep_large_memory", "cuda", 2),
        ("keep_large_memory", "cpu", 0),
    ],
)
def test_pieces_of_memory_are_kept_on_a_cpu(name: str, device: str, mapped: int) -> None:
    command = [sys.executable, "-c", MAPPED, name, device]
    assert int(subprocess.run(command, capture_output=True, check=True).stdout) == mapped


class Kept(BaseException):
    """So far a stage is to come."""


def trains(pipeline: Path, images: Path, latents: Path, folder: Path) -> None:
    run_here(pipeline, latents, folder)


def encodes(pipeline: Path, images: Path, latents: Path, folder: Path) -> None:
    encode(Encode(), Pretrained(pipeline=str(pipeline)), images, folder / "out", folder / "runs")


def trains_a_first_stage(pipeline: Path, images: Path, latents: Path, folder: Path) -> None:
    first_stage(FirstStage(), images, folder / "out", folder / "runs")


def draws(pipeline: Path, images: Path, latents: Path, folder: Path) -> None:
    Painter.load(Source(str(pipeline)))


def reports(pipeline: Path, images: Path, latents: Path, folder: Path) -> None:
    made = opening(latents, "latents", "encode")
    _reconstructions(opening(images, "images", "ingest"), made, pipeline)


@pytest.mark.parametrize("stage", [trains, encodes, trains_a_first_stage, draws, reports])
def test_all_that_computes_keeps_its_memory(
    pipeline: Path,
    images: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: Callable[[Path, Path, Path, Path], None],
) -> None:
    def noted(_: Mapping[int, int]) -> None:
        raise Kept

    monkeypatch.setattr(ldm.memory, "_set_malloc", noted)
    with pytest.raises(Kept):
        stage(pipeline, images, latents, tmp_path)
