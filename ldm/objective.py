"""What a training minimises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.nn import functional as F

from ldm.data import Batch
from ldm.diffusion import Levels, add_noise, min_snr_weights, target
from ldm.unet import denoise


@dataclass(frozen=True)
class Objective:
    """Noise schedule, prediction type and loss weights of a training."""

    prediction: str
    levels: Levels
    weights: torch.Tensor

    @classmethod
    def of(cls, schedule: Mapping[str, Any], gamma: float | None) -> Self:
        """The objective on a diffusers scheduler configuration, with min-SNR ``gamma`` if given."""
        levels, prediction = Levels.of(schedule), str(schedule["prediction_type"])
        return cls(prediction, levels, min_snr_weights(prediction, levels, gamma))

    def loss(self, unet: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Weighted squared error of each sample, mean over its elements: float32 (n,)."""
        noisy = add_noise(self.levels, batch.latents, batch.noise, batch.timesteps)
        wanted = target(self.prediction, self.levels, batch.latents, batch.noise, batch.timesteps)
        output = denoise(unet, noisy, batch.timesteps, batch.states)
        error = F.mse_loss(output.float(), wanted, reduction="none").mean(dim=(1, 2, 3))
        return error * self.weights.to(error)[batch.timesteps]
