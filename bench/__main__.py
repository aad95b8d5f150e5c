"""``python -m bench``: the trainer's step over the bare loop.

Needs ``artifacts/latents`` (``make demo`` makes it). Both loops train the same UNet from the same
weights in the same precision; the bare one sees one fixed batch and does nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from ldm.config import Pretrained, Train
from ldm.data import LatentCache, TrainingBatches
from ldm.device import device_of
from ldm.ema import Ema
from ldm.models import load_scheduler_config, load_unet, locate
from ldm.objective import Objective

BATCH, ROUNDS, STEPS = 64, 5, 4


def main() -> None:
    """Print samples a second of both loops and their ratio, round by round, then the median."""
    bare, ours = loops(Path("artifacts/latents"))
    for loop in (bare, ours):
        loop()
    ratios = []
    print(f"{'bare loop':>12} {'ours':>12} {'ratio':>7}   samples a second, batch {BATCH}")
    for _ in range(ROUNDS):
        speeds = [STEPS * BATCH / timed(loop) for loop in (bare, ours)]
        ratios.append(speeds[1] / speeds[0])
        print(f"{speeds[0]:12.1f} {speeds[1]:12.1f} {ratios[-1]:7.3f}")
    print(f"median ratio {median(ratios):.3f}")


def loops(latents: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """The bare loop and the trainer's, each a function that takes ``STEPS`` steps."""
    device = device_of()
    source = locate(Pretrained().pipeline)
    objective = Objective.of(load_scheduler_config(source), Train().min_snr_gamma)
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
    ema = Ema(unet_ours, 0.999)
    position = iter(range(1, 10**9))

    def step(unet: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def bare() -> None:
        for _ in range(STEPS):
            with torch.autocast(device.type, torch.bfloat16):
                output = unet_bare(fixed.latents, fixed.timesteps, fixed.states).sample
                loss = torch.nn.functional.mse_loss(output.float(), fixed.noise)
            step(unet_bare, optimizer_bare, loss)

    def ours() -> None:
        for _ in range(STEPS):
            batch = batches[next(position)].to(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = objective.loss(unet_ours, batch).mean()
            step(unet_ours, optimizer_ours, loss)
            ema.update(unet_ours)

    return bare, ours


def timed(loop: Callable[[], None]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    loop()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
