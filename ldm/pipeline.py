"""A trained model as a folder in Stable Diffusion layout, which diffusers opens as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from ldm.artifacts import write_json
from ldm.diffusion import FLOW
from ldm.models import Encoders
from ldm.unet import Network, as_diffusers


def save_pipeline(
    folder: Path, encoders: Encoders, unet: Network, schedule: dict[str, Any]
) -> None:
    """Write the UNet with the encoders it was trained for and its own noise schedule."""
    # With this scheduler StableDiffusionPipeline draws, whatever the network predicts. It sets an
    # offset of 1 itself, and no clipping, which is for pixels, with pages of warnings.
    of_flow = {"use_flow_sigmas": schedule["prediction_type"] == FLOW}
    scheduler = DPMSolverMultistepScheduler.from_config(
        {"steps_offset": 1, **schedule, **of_flow, "clip_sample": False}
    )
    pipeline = StableDiffusionPipeline(
        vae=encoders.vae,
        text_encoder=encoders.text_encoder,
        tokenizer=encoders.tokenizer,
        unet=as_diffusers(unet.to(torch.float32)),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    forget_origin(folder)
    if "timestep_spacing" not in schedule:
        written = folder / "scheduler" / "scheduler_config.json"
        content = json.loads(written.read_text())
        del content["timestep_spacing"]
        write_json(written, content)


def forget_origin(folder: Path) -> None:
    """Drop the paths that the libraries note in configurations: same model, same bytes."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            write_json(path, content)
