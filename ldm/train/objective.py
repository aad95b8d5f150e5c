"""What a training minimises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.nn import functional as F

from ldm.diffusion import PREDICTIONS, Levels, add_noise, snr_weights, target
from ldm.errors import UserError
from ldm.train.data import Batch


@dataclass(frozen=True)
class Objective:
    """Noise schedule, prediction type and loss weights of a training."""

    prediction: str
    levels: Levels
    weights: torch.Tensor

    @classmethod
    def of(cls, schedule: Mapping[str, Any], gamma: float | None, floor: float = 0.0) -> Self:
        """The objective on a diffusers scheduler configuration; weights by :func:`snr_weights`."""
        levels, prediction = Levels.of(schedule), str(schedule["prediction_type"])
        if prediction not in PREDICTIONS:
            raise UserError(
                f"train.init: the starting model's network predicts {prediction!r}; give one that "
                f"predicts one of {', '.join(PREDICTIONS)}"
            )
        if prediction == "epsilon" and schedule.get("rescale_betas_zero_snr"):
            raise UserError(
                "train.init: the starting model predicts epsilon on a schedule that ends in noise "
                "alone (rescale_betas_zero_snr), of which that tells nothing; start from a model "
                "that predicts v"
            )
        if floor and prediction == "epsilon":
            raise UserError(
                f"train.snr_floor {floor}: the model predicts epsilon, of which the noisiest "
                "timesteps tell next to nothing about the picture; set train.snr_floor to 0"
            )
        return cls(prediction, levels, snr_weights(prediction, levels, gamma, floor))

    def to(self, device: torch.device) -> Objective:
        """The same objective on a device, or each step would wait there for its tables."""
        return Objective(self.prediction, self.levels.to(device), self.weights.to(device))

    def loss(self, denoiser: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Weighted squared error of each sample, mean over its elements: float32 (n,).

        ``denoiser``: a :class:`ldm.denoiser.Denoiser`, maybe within another module.
        """
        noisy = add_noise(self.levels, batch.latents, batch.noise, batch.timesteps)
        wanted = target(self.prediction, self.levels, batch.latents, batch.noise, batch.timesteps)
        told = self.levels.told.to(noisy.device)[batch.timesteps]
        output = denoiser(noisy, told, batch.texts)
        error = F.mse_loss(output.float(), wanted, reduction="none").mean(dim=(1, 2, 3))
        return error * self.weights.to(error)[batch.timesteps]
