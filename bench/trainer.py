"""The trainer's step over the bare loop.

Needs ``artifacts/latents`` (``make demo`` makes it). Both loops train the same UNet from the same
weights in the same precision; the bare one sees one fixed batch and does nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from bench.compare import compare
from ldm.config import Pretrained, Train
from ldm.data import LatentCache
from ldm.denoiser import Denoiser, load_scheduler_config, load_unet
from ldm.device import autocast, device_of
from ldm.models import locate
from ldm.objective import Objective
from ldm.run_log import RunLog
from ldm.termination import Termination
from ldm.train import accelerator_for, settled
from ldm.trainer import LOG, Trainer
from ldm.unet import denoise

BATCH, ROUNDS, STEPS = 64, 7, 20


def main() -> None:
    """Print samples a second of both loops and their ratio."""
    with tempfile.TemporaryDirectory() as run:
        bare, ours = loops(Path("artifacts/latents"), Path(run))
        title = f"training, tiny, batch {BATCH}, precision auto: samples a second"
        compare(title, ("bare loop", bare), ("ldm train", ours), STEPS * BATCH, ROUNDS)


def loops(latents: Path, run: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """The bare loop and the trainer's, each a function that takes ``STEPS`` steps."""
    device = device_of()
    config = settled(Train(batch_size=BATCH, steps=10**6), device)
    source = locate(Pretrained().pipeline)
    schedule = load_scheduler_config(source)
    objective = Objective.of(schedule, config.min_snr_gamma, config.snr_floor)
    accelerator = accelerator_for(config, device)
    cache = LatentCache(latents, "train")
    held_out = LatentCache(latents, "validation")
    denoiser = Denoiser(load_unet(source))
    trainer = Trainer(accelerator, config, objective, cache, held_out, denoiser, run)
    micro_batches, numbers = trainer.micro_batches(0), count()
    log = RunLog(run / LOG, 0, writes=True)
    unet = load_unet(source).to(device).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    fixed = trainer.batches[0].to(device)

    def bare() -> None:
        for _ in range(STEPS):
            with autocast(device, "auto"):
                output = denoise(unet, fixed.latents, fixed.timesteps, fixed.texts)
                loss = torch.nn.functional.mse_loss(output.float(), fixed.noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def ours() -> None:
        for _ in range(STEPS):
            trainer.step(next(numbers), micro_batches, Termination(), log)

    return bare, ours
