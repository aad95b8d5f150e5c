"""Pictures to latents and back, by the frozen VAE."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

AT_ONCE = 2**20
"""Pixels that are decoded at a time: in float32 they take 3 GB at Stable Diffusion's widths."""


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (n, 3, s h, s w) in [-1, 1] to the means of their posteriors: (n, c, h, w).

    Shifted and scaled to about unit variance; ``s`` is :func:`pixels_a_latent`.
    """
    mean: torch.Tensor = vae.encode(pictures.to(vae.device)).latent_dist.mean
    return (mean - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (n, c, h, w) to pictures in about [-1, 1]: (n, 3, s h, s w)."""
    plain = latents / vae.config.scaling_factor + _shift(vae)
    each = latents.shape[-2] * latents.shape[-1] * pixels_a_latent(vae) ** 2
    return torch.cat([vae.decode(part).sample for part in plain.split(max(1, AT_ONCE // each))])


def pixels_a_latent(vae: AutoencoderKL) -> int:
    """How many pixels a latent stands for, along a side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _shift(vae: AutoencoderKL) -> float:
    return float(vae.config.shift_factor or 0.0)
