"""What a training's settings come to: on this device, in so many processes, for the result."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
)

from ldm.config import Train
from ldm.device import has_bfloat16
from ldm.errors import UserError

COMPILERS = {"cpu": ("CXX", ("g++",)), "cuda": ("CC", ("gcc", "clang"))}
"""By kind of device: the variable that names the compiler for ``torch.compile``, and who else."""


def settled_training(config: Train, device: torch.device) -> Train:
    """The same settings with the precision that the device gives ``auto``.

    UserError for what the device cannot do.
    """
    _check_device(config, device)
    if config.mixed_precision != "auto":
        return config
    lower = has_bfloat16(device)
    return config.model_copy(update={"mixed_precision": "bf16" if lower else "no"})


def _check_device(config: Train, device: torch.device) -> None:
    """What would be ignored, or fail in the first step with pages of C++."""
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError(
            "train.mixed_precision fp16: is for GPUs, and there is none; set auto, bf16 or no"
        )
    variable, usual = COMPILERS[device.type]
    compilers = (os.environ[variable],) if variable in os.environ else usual
    if config.compile and not any(map(shutil.which, compilers)):
        raise UserError(
            f"train.compile: there is no {' or '.join(compilers)}, which torch.compile wants; "
            "install it, or set train.compile to false"
        )


def accelerator_for(config: Train, device: torch.device) -> Accelerator:
    """This process's part in a training, on the device's kind."""
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulation,
        # A step uses each weight once. To keep what it is in bfloat16 would only take memory.
        kwargs_handlers=[
            AutocastKwargs(cache_enabled=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.patience_s)),
            # Else each process holds its gradients twice.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )


def settings_of_result(config: Train) -> dict[str, Any]:
    """The settings that decide the result; where, in which parts and how often to save do not."""
    how = {"workers", "log_every", "checkpoint_every", "keep_checkpoints", "accelerate", "track"}
    how |= {"accumulation", "gradient_checkpointing", "patience_s", "max_skipped"}
    how |= {"validate_every", "sample_every", "sample_prompts"}
    return {key: value for key, value in config.as_dict().items() if key not in how}


def check_batch(config: Train, processes: int) -> None:
    """UserError where the processes cannot share a step evenly."""
    if config.batch_size % (processes * config.accumulation):
        raise UserError(
            f"train.batch_size: {config.batch_size} cannot be shared by {processes} processes with "
            f"accumulation {config.accumulation}; make it a multiple of their product"
        )
