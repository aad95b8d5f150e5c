"""Checkpoints survive what happens to files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.checkpoint import (
    Checkpoint,
    folders,
    is_whole,
    newest,
    optimizer_tensors,
    restore_optimizer,
    save,
)


def at(step: int) -> Checkpoint:
    tensors = {"weight": torch.full((3, 2), float(step))}
    return Checkpoint(step, tensors, tensors, {"0.step": torch.tensor(float(step))})


def test_newest_comes_back(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, at(step), keep=2)
    found = newest(tmp_path)
    assert found is not None and found.step == 30
    assert torch.equal(found.ema["weight"], at(30).ema["weight"])
    assert [folder.name for folder in folders(tmp_path)] == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "no state"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, at(10), keep=3)
    latest = save(tmp_path, at(20), keep=3)
    weights = latest / "ema.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-4])
    elif damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    else:
        (latest / "state.json").write_text("{")
    assert not is_whole(latest)
    found = newest(tmp_path)
    assert found is not None and found.step == 10


def test_a_half_written_one_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, at(10), keep=3).rename(tmp_path / ".step-00000010.writing")
    assert newest(tmp_path) is None


def test_the_optimizer_goes_on_as_if_never_stopped() -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 4)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    def step(module: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
        module(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    module, optimizer = make()
    step(module, optimizer)
    other, fresh = make()
    other.load_state_dict(module.state_dict())
    restore_optimizer(fresh, {k: v.clone() for k, v in optimizer_tensors(optimizer).items()})
    step(module, optimizer)
    step(other, fresh)
    assert torch.equal(module.weight, other.weight)
