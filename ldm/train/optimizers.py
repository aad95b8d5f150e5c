"""The optimizers of a training, by name."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import torch

from ldm.config import Train
from ldm.denoiser import Denoiser, trained
from ldm.errors import UserError

Groups = list[dict[str, Any]]


def make_optimizer(config: Train, denoiser: Denoiser) -> torch.optim.Optimizer:
    """The configured one, on what of a denoiser is trained; ``peak`` in a group is its own rate.

    UserError if it is of a package that is not installed.
    """
    peaks = {"unet": config.learning_rate, "text_encoder": config.text_learning_rate}
    groups: Groups = [
        {"params": list(trained(network).values()), "peak": peaks[name]}
        for name, network in denoiser.named_children()
    ]
    make = {"adamw": _adamw, "adamw8bit": _adamw8bit, "prodigy": _prodigy}[config.optimizer]
    return make(groups, config.learning_rate, config.weight_decay)


def _adamw(groups: Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)


def _adamw8bit(groups: Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    """Both moments in 8 bits by blocks; those of tensors below 4,096 numbers stay float32."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "train.optimizer adamw8bit: bitsandbytes is not installed; run `pip install --no-deps "
            "'bitsandbytes>=0.50,<0.51'`, or set train.optimizer to adamw"
        ) from error
    return AdamW8bit(groups, lr=rate, weight_decay=decay)


def _prodigy(groups: Groups, rate: float, decay: float) -> torch.optim.Optimizer:
    """As diffusers' training scripts set it up, whose rates have a warm-up too."""
    from prodigyopt import Prodigy

    with redirect_stdout(io.StringIO()):  # It prints how it decays.
        return Prodigy(
            groups, lr=rate, weight_decay=decay, use_bias_correction=True, safeguard_warmup=True
        )
