"""The UNet of Stable Diffusion 1 with random weights, and what a step sees."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bench import SMALL
from bench.sd_encoders import TOKENS, WIDTH
from ldm.device import device_of
from ldm.train.data import Batch
from ldm.unet import Network, from_scratch

DEVICE = device_of()


@dataclass(frozen=True)
class Size:
    """Pixels of a picture's side, and pictures a batch: plain, full and, with 139 GB, large."""

    pixels: int
    plain: int
    full: int
    large: int


SIZES = (Size(64, 1, 2, 3),) if SMALL else (Size(512, 4, 32, 96), Size(256, 16, 128, 384))


def stable_diffusion() -> Network:
    """Its UNet, 860 M parameters, float32, on the device; or a toy with its ways in and out."""
    widths = (32, 64) if SMALL else (320, 640, 1280, 1280)
    depth = len(widths) - 1
    with DEVICE:
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=widths,
            down_block_types=("CrossAttnDownBlock2D",) * depth + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * depth,
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
        )
    return from_scratch(unet).train()


def random_batch(size: Size, pictures: int) -> Batch:
    """What a step sees, on the device."""
    shape = (pictures, 4, size.pixels // 8, size.pixels // 8)
    latents, noise = torch.randn(2, *shape, device=DEVICE)
    texts = torch.randn(pictures, TOKENS, WIDTH, device=DEVICE)
    return Batch(latents, noise, texts, torch.randint(0, 1000, (pictures,), device=DEVICE))


def in_bfloat16() -> AbstractContextManager[Any]:
    """What a training computes in. A step uses each weight once, so none is kept in bfloat16."""
    return torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=False)
