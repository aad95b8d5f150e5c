"""Puts a trained model and its first stage together as the embedded ``tiny``, in half precision.

``python -m ldm.pretrained MODEL FIRST_STAGE``; the last step of ``infra/make-tiny.sh``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from ldm.artifacts import opening
from ldm.models import tiny_folder
from ldm.pipeline_folder import forget_origin

FROZEN = ("vae", "text_encoder", "tokenizer", "clip")


def install(model: Path, first_stage: Path, target: Path) -> None:
    """Copy the frozen parts as they are and the UNet in half precision into ``target``."""
    opening(model, "model", "train")
    opening(first_stage, "first-stage", "first-stage")
    for part in FROZEN:
        shutil.rmtree(target / part, ignore_errors=True)
        shutil.copytree(first_stage / part, target / part)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float16)
    unet.save_pretrained(target / "unet")
    shutil.rmtree(target / "scheduler", ignore_errors=True)
    shutil.copytree(model / "scheduler", target / "scheduler")
    shutil.copyfile(model / "model_index.json", target / "model_index.json")
    forget_origin(target)
    shutil.copyfile(first_stage / "measured.json", target / "first-stage.json")
    shutil.copyfile(model / "log.jsonl", target / "training-log.jsonl")


if __name__ == "__main__":
    install(Path(sys.argv[1]), Path(sys.argv[2]), tiny_folder())
