"""What is left of memory, and that a training asks for no more than it needs."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

import ldm.saver
from ldm.checkpoint import Checkpoint, newest, save
from ldm.memory import available
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
