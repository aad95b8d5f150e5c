"""The trainer's step over the bare loop.

Needs ``artifacts/latents`` (``make demo`` makes it). Both loops train the same UNet from the same
weights in the same precision; the bare one sees one fixed batch and does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from bench.compare import compare
from ldm.config import Pretrained, Train
from ldm.data import LatentCache, TrainingBatches
from ldm.denoiser import Denoiser, load_scheduler_config, load_unet
from ldm.device import autocast, device_of
from ldm.ema import Ema
from ldm.models import locate
from ldm.objective import Objective
from ldm.unet import denoise

BATCH, ROUNDS, STEPS = 64, 5, 4


def main() -> None:
    """Print samples a second of both loops and their ratio."""
    bare, ours = loops(Path("artifacts/latents"))
    compare(
        f"training, tiny, batch {BATCH}, precision auto: samples a second",
        ("bare loop", bare),
        ("ours", ours),
        STEPS * BATCH,
        ROUNDS,
    )


def loops(latents: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """The bare loop and the trainer's, each a function that takes ``STEPS`` steps."""
    device = device_of()
    source = locate(Pretrained().pipeline)
    weights = Train()
    objective = Objective.of(
        load_scheduler_config(source), weights.min_snr_gamma, weights.snr_floor
    )
    cache = LatentCache(latents, "train")
    batches = TrainingBatches(
        cache, seed=0, batch_size=BATCH, timesteps=len(objective.levels), caption_dropout=0.1
    )
    fixed = batches[0].to(device)

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        unet = load_unet(source).to(device).train()
        return unet, torch.optim.AdamW(unet.parameters(), lr=1e-4)

    unet_bare, optimizer_bare = make()
    unet_ours, optimizer_ours = make()
    denoiser = Denoiser(unet_ours)
    ema = Ema(denoiser, 0.999)
    position = iter(range(1, 10**9))

    def step(unet: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def bare() -> None:
        for _ in range(STEPS):
            with autocast(device, "auto"):
                output = denoise(unet_bare, fixed.latents, fixed.timesteps, fixed.texts)
                loss = torch.nn.functional.mse_loss(output.float(), fixed.noise)
            step(unet_bare, optimizer_bare, loss)

    def ours() -> None:
        for _ in range(STEPS):
            batch = batches[next(position)].to(device)
            with autocast(device, "auto"):
                loss = objective.loss(denoiser, batch).mean()
            step(unet_ours, optimizer_ours, loss)
            ema.update(denoiser)

    return bare, ours
