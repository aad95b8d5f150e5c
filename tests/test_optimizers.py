"""Learning rates and optimizers: that they learn, and that their state comes back."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from ldm.config import Train
from ldm.denoiser import Denoiser
from ldm.errors import UserError
from ldm.learning_rate import rate_factor
from ldm.optimizer_state import optimizer_tensors, restore_optimizer
from ldm.train.optimizers import make_optimizer
from tests.test_train import read_log, run_here


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_rates_are_those_of_transformers(decay: str) -> None:
    """Those of a step later in the warm-up: ours does not spend its first step on a rate of 0."""
    total, warmup = 40, 7
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if decay == "constant" else decay
    reference = get_scheduler(name, optimizer, warmup, total)
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    ours = [rate_factor(step, total=total, warmup=warmup, decay=decay) for step in range(total)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], abs=1e-12)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_log_has_the_rates_of_the_schedule(
    pipeline: Path, latents: Path, tmp_path: Path, decay: str
) -> None:
    model = run_here(pipeline, latents, tmp_path, schedule=decay, learning_rate=1e-3, log_every=1)
    rates = [line["lr"] for line in read_log(model) if "lr" in line]
    expected = [rate_factor(step, total=12, warmup=2, decay=decay) for step in range(12)]
    assert rates == pytest.approx([1e-3 * factor for factor in expected])


OPTIMIZERS = {
    "adamw": (3e-3, {"step", "exp_avg", "exp_avg_sq"}),
    "adamw8bit": (3e-3, {"step", "state1", "state2", "qmap1", "absmax1"}),
    "prodigy": (1.0, {"step", "exp_avg", "s", "p0", "d", "d_max", "d_numerator", "k"}),
}
"""A rate for each, and what of its state is in a checkpoint."""


@pytest.fixture(params=OPTIMIZERS)
def optimizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "adamw8bit":
        # Where `make test` puts it. Among the others each process would take a second to import it.
        monkeypatch.syspath_prepend(Path(sys.prefix) / "extras")
        pytest.importorskip("bitsandbytes")
    return str(request.param)


def test_every_optimizer_learns(optimizer: str) -> None:
    """A network of two layers to do what one of one does."""
    torch.manual_seed(0)
    given = torch.randn(256, 64)
    wanted = torch.nn.Linear(64, 64)(given).detach()
    layers = torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64)
    denoiser = Denoiser(torch.nn.Sequential(*layers))  # type: ignore[arg-type]
    config = {"optimizer": optimizer, "learning_rate": OPTIMIZERS[optimizer][0]}
    made = make_optimizer(Train.model_validate(config), denoiser)
    losses = []
    for _ in range(300):
        loss = torch.nn.functional.mse_loss(denoiser.unet(given), wanted)
        loss.backward()
        made.step()
        made.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_every_optimizer_resumes_bit_for_bit(
    pipeline: Path, latents: Path, tmp_path: Path, optimizer: str
) -> None:
    rate, state = OPTIMIZERS[optimizer]
    settings: dict[str, Any] = {"optimizer": optimizer, "learning_rate": rate, "steps": 36}
    settings |= {"schedule": "constant", "checkpoint_every": 30, "validate_every": 36}
    run_here(pipeline, latents, tmp_path, **settings)
    first, last = sorted(tmp_path.glob("runs/*/step-*"))
    saved = load_file(first / "optimizer.safetensors")
    assert state <= {name.rpartition(".")[2] for name in saved}
    # As in the beginning, Prodigy's would not show whether it comes back.
    assert optimizer != "prodigy" or float(saved["group.0.d"]) > 1e-6
    straight = {path.name: path.read_bytes() for path in last.iterdir()}
    shutil.rmtree(last)
    run_here(pipeline, latents, tmp_path, **settings)
    assert {path.name: path.read_bytes() for path in last.iterdir()} == straight


def test_eight_bits_without_bitsandbytes_is_one_line(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        UserError, match=r"is not installed; run `pip install --no-deps .*bitsandbytes"
    ):
        run_here(pipeline, latents, tmp_path, optimizer="adamw8bit")


def test_a_scaler_goes_on_as_if_never_stopped() -> None:
    """Its scale halves at an overflow and doubles after a while; both are state."""

    def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer, torch.amp.GradScaler]:
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 4)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1), scaler

    def step(parts: tuple[Any, ...], factor: float) -> None:
        module, optimizer, scaler = parts
        scaler.scale(factor * module(torch.ones(2, 4)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    parts = make()
    for factor in (1.0, math.inf, 1.0, 1.0):
        step(parts, factor)
    fresh = make()
    fresh[0].load_state_dict(parts[0].state_dict())
    saved = {name: one.clone() for name, one in optimizer_tensors(*parts[1:]).items()}
    restore_optimizer(fresh[1], saved, fresh[2])
    assert fresh[2].state_dict() == parts[2].state_dict() != make()[2].state_dict()
    for _ in range(2):
        step(parts, 1.0)
        step(fresh, 1.0)
    assert parts[2].get_scale() == fresh[2].get_scale() == 2.0**10
    assert torch.equal(parts[0].weight, fresh[0].weight)
