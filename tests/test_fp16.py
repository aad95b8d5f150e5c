"""Training in fp16: a scaler finds its scale by overflowing; what else is not finite is told.

accelerate gives a CPU no scaler, and ``ldm train`` refuses fp16 there; here it computes in fp16
with one, as accelerate has a GPU do.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import ldm.train.settings
import ldm.train.stage
from ldm.checkpoint import folders
from ldm.config import Train
from ldm.errors import UserError
from ldm.train.objective import Objective
from tests.test_train import assert_fourth_skipped, endless_at, read_log, run_here, weights

FP16 = {"mixed_precision": "fp16", "log_every": 1}
TOO_MUCH = 2.0**26

pytestmark = pytest.mark.usefixtures("any_precision")


def scaled(monkeypatch: pytest.MonkeyPatch, first: float, finite_up_to: float = math.inf) -> None:
    """Have a CPU take fp16, and scale by ``first`` at first; greater scales overflow anyway."""
    made, whole = ldm.train.stage.accelerator_for, Objective.loss
    scalers = []

    def accelerator_for(config: Train, device: torch.device) -> Accelerator:
        accelerator = made(config, device)
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=first, growth_interval=3)
        scalers.append(accelerator.scaler)
        return accelerator

    def loss(*arguments: Any) -> torch.Tensor:
        each: torch.Tensor = whole(*arguments)
        if each.requires_grad and scalers[-1].get_scale() > finite_up_to:
            each.register_hook(lambda gradient: gradient * torch.inf)
        return each

    monkeypatch.setattr(ldm.train.settings, "_check_device", lambda *_: None)
    monkeypatch.setattr(ldm.train.stage, "accelerator_for", accelerator_for)
    monkeypatch.setattr(Objective, "loss", loss)


def test_a_scaler_finds_its_scale_and_goes_on_from_it(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that overflow are no steps, and no samples' fault, however many there are."""
    scaled(monkeypatch, TOO_MUCH)
    settings = {**FP16, "steps": 16, "checkpoint_every": 8, "validate_every": 16, "max_skipped": 1}
    model = run_here(pipeline, latents, tmp_path, **settings)
    start, after = weights(pipeline), weights(model)
    assert all(one.isfinite().all() for one in after.values())
    assert not all(torch.equal(one, start[name]) for name, one in after.items())
    log = read_log(model)
    assert not [line for line in log if "skipped" in line]
    (run,) = (tmp_path / "runs").iterdir()
    *_, last = folders(run)
    state = load_file(last / "optimizer.safetensors")
    taken = {int(one) for name, one in state.items() if name.endswith(".step")}
    scales = [line["loss_scale"] for line in log if "loss_scale" in line]
    overflown = 16 - sum("loss" in line for line in log)
    assert len(scales) == overflown >= 2 and taken == {16 - overflown}
    assert scales[:2] == [TOO_MUCH / 2, TOO_MUCH / 4]
    assert 0 < float(state["scaler.scale"]) < TOO_MUCH
    straight = {path.name: path.read_bytes() for path in last.iterdir()}
    (last / "state.json").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    run_here(pipeline, latents, tmp_path, **settings)
    assert {path.name: path.read_bytes() for path in last.iterdir()} == straight


def test_a_scaler_that_never_finds_a_scale_stops_the_training(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the loss is finite and the gradient is not, whatever the scale."""
    scaled(monkeypatch, 8.0, finite_up_to=0.0)
    with pytest.raises(UserError, match=r"step 7: no finite loss or gradient for 4 steps in a row"):
        run_here(pipeline, latents, tmp_path, **FP16, max_skipped=3)


def test_a_loss_without_end_is_skipped_under_a_scaler_too(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the gradient is finite, which is all that the scaler looks at."""
    scaled(monkeypatch, 8.0)
    endless_at(monkeypatch, 4)
    model = run_here(pipeline, latents, tmp_path, **FP16)
    assert_fourth_skipped(model, tmp_path)
