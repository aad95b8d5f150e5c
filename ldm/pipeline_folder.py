"""A trained model as a folder in Stable Diffusion layout, which diffusers opens as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from ldm.models import Source, load_text_encoder, load_vae


def save_pipeline(
    folder: Path, source: Source, unet: UNet2DConditionModel, schedule: dict[str, Any]
) -> None:
    """Write the UNet with the frozen parts of ``source`` and its own noise schedule."""
    tokenizer, text_encoder = load_text_encoder(source)
    vae: AutoencoderKL = load_vae(source)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.to(torch.float32),
        scheduler=DPMSolverMultistepScheduler.from_config(schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
