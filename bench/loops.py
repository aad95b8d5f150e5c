"""What a training is measured against: the step that does what it must, and one that encodes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel

from ldm.train.data import Batch
from ldm.unet import denoise

Precision = Callable[[], AbstractContextManager[Any]]
"""Opens the context that a step computes in."""


def bare(
    unet: torch.nn.Module, batches: Callable[[], Batch], precision: Precision
) -> Callable[[], None]:
    """A step of forward, backward, clipping and AdamW, and of nothing else."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        batch = batches()
        with precision():
            output = denoise(unet, batch.latents, batch.timesteps, batch.texts)
            loss = torch.nn.functional.mse_loss(output.float(), batch.noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def times(count: int, step: Callable[[], object]) -> Callable[[], None]:
    """So many steps as one."""

    def run() -> None:
        for _ in range(count):
            step()

    return run


def encoding(
    vae: AutoencoderKL,
    clip: CLIPTextModel,
    pictures: torch.Tensor,
    ids: torch.Tensor,
    precision: Precision,
) -> Callable[[], Batch]:
    """A batch as the usual fine-tuning scripts make it: by VAE and CLIP at every step."""
    count, device = len(pictures), pictures.device

    @torch.no_grad()
    def batch() -> Batch:
        with precision():
            latents = vae.encode(pictures.to(vae.dtype)).latent_dist.sample().float()
            states = clip(ids).last_hidden_state.float()
        latents *= vae.config["scaling_factor"]
        timesteps = torch.randint(0, 1000, (count,), device=device)
        return Batch(latents, torch.randn_like(latents), states, timesteps)

    return batch
