"""Puts a trained model and its first stage together as the embedded ``tiny``, in half precision.

``python -m ldm.pretrained FIRST_STAGE MODEL...``, the last step of ``infra/make-tiny.sh``: models
trained one from the other, of which the last is taken, and all their logs.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from ldm.artifacts import opening
from ldm.models import Source, load_text_encoder, tiny_folder
from ldm.pipeline import forget_origin
from ldm.quiet import quieten
from ldm.run_log import LOG

FIRST = ("vae", "tokenizer", "clip")


def install(first_stage: Path, models: Sequence[Path], target: Path) -> None:
    """Copy the first stage and, in half precision, the UNet and the text encoder to ``target``.

    The text encoder's file is float32 all the same: transformers loads what the file has, diffusers
    float32, and the two would not fit together in a pipeline that is opened as it is.
    """
    model = models[-1]
    opening(first_stage, "first-stage", "first-stage")
    for one in models:
        opening(one, "model", "train")
    for number, one in enumerate(models, start=1):
        shutil.copyfile(one / LOG, target / f"training-{number}.jsonl")
    for part in FIRST:
        shutil.rmtree(target / part, ignore_errors=True)
        shutil.copytree(first_stage / part, target / part)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float16)
    unet.save_pretrained(target / "unet")
    source = Source(str(model))
    load_text_encoder(source)[1].half().float().save_pretrained(target / "text_encoder")
    shutil.rmtree(target / "scheduler", ignore_errors=True)
    shutil.copytree(model / "scheduler", target / "scheduler")
    shutil.copyfile(model / "model_index.json", target / "model_index.json")
    forget_origin(target)
    shutil.copyfile(first_stage / "measured.json", target / "first-stage.json")


if __name__ == "__main__":
    quieten()
    install(Path(sys.argv[1]), [Path(model) for model in sys.argv[2:]], tiny_folder())
