"""One training step of the from-scratch UNet over one of diffusers', both eager, same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bench.compare import compare
from ldm.device import autocast, device_of, plain_attention
from ldm.memory import keep_memory
from ldm.models import locate
from ldm.pipeline import load_unet
from ldm.unet import denoise, from_scratch

SD_BLOCK = {
    "sample_size": 32,
    "block_out_channels": (320,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""The finest level of Stable Diffusion 1, at 256 pixels."""


DEVICE = device_of()


@plain_attention(DEVICE)
def main() -> None:
    """Print steps a second of both, at the shape of ``tiny`` and of a level of Stable Diffusion."""
    keep_memory(DEVICE)  # As ``train`` does.
    tiny = load_unet(locate("tiny"), "diffusers")
    run("tiny, batch 64, precision auto", tiny, 64, 40, DEVICE)
    torch.manual_seed(0)
    run("a level of SD 1, batch 1, float32", UNet2DConditionModel(**SD_BLOCK), 1, 77, DEVICE)


def run(title: str, theirs: Any, batch: int, tokens: int, device: torch.device) -> None:
    """Compare both networks on random inputs."""
    steps = 8 if batch > 1 else 2
    ours = from_scratch(theirs)
    networks = [network.to(device).train() for network in (theirs, ours)]
    states = torch.randn(batch, tokens, theirs.config.cross_attention_dim, device=device)
    first, second = (stepper(one, states, steps) for one in networks)
    name = f"training step, {title}: steps a second"
    compare(name, ("diffusers", first), ("ours", second), steps, rounds=5)


def stepper(unet: Any, states: torch.Tensor, steps: int) -> Callable[[], None]:
    """Forward, backward and AdamW on one fixed batch, ``steps`` times."""
    batch, side, device = len(states), unet.config.sample_size, states.device
    latents = torch.randn(batch, unet.config.in_channels, side, side, device=device)
    timesteps = torch.randint(0, 1000, (batch,), device=device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        for _ in range(steps):
            with autocast(device, "auto" if batch > 1 else "float32"):
                loss = denoise(unet, latents, timesteps, states).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
