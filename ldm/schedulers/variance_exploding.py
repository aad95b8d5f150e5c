"""Euler and LMS: the probability-flow ODE over sigma, the noise's part in units of the signal's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Polynomial

from ldm.diffusion import predicted_noise
from ldm.schedulers.base import Sampler, spaced


def sigmas_at(abar: list[float], timesteps: list[float]) -> list[float]:
    """``sqrt((1 - abar) / abar)`` at timesteps, straight lines between whole ones."""
    levels = np.sqrt((1 - np.asarray(abar)) / np.asarray(abar))
    return [float(one) for one in np.interp(timesteps, np.arange(len(levels)), levels)]


class EulerSampler(Sampler):
    """Euler's method on the ODE (arXiv:2206.00364, algorithm 1 without the second order)."""

    smallest = 2.0**-24

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        self.timesteps = spaced(schedule, steps, "linspace", whole=False)
        self.sigmas = [*sigmas_at(self.abar, self.timesteps), 0.0]
        largest = max(self.sigmas)
        whole_noise = schedule.get("timestep_spacing", "linspace") != "leading"
        self.start_scale = largest if whole_noise else (largest**2 + 1) ** 0.5

    def model_input(self, latents: torch.Tensor, call: int) -> torch.Tensor:
        """Latents of variance ``sigma ** 2 + 1`` brought back to unit variance."""
        return latents / (self.sigmas[call] ** 2 + 1) ** 0.5

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """Along the slope to the next sigma."""
        width = self.sigmas[call + 1] - self.sigmas[call]
        return latents + width * self.slope(output, call, latents)

    def slope(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """``d latents / d sigma``: the predicted noise (arXiv:2206.00364, eq. 3)."""
        abar = 1 / (self.sigmas[call] ** 2 + 1)
        return predicted_noise(self.prediction, abar, self.model_input(latents, call), output)


class LMSSampler(EulerSampler):
    """Linear multistep: the polynomial through the last slopes, integrated over the step."""

    order = 4

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        self._slopes: list[torch.Tensor] = []

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """With as many slopes as there are, four at most."""
        self._slopes = [*self._slopes[1 - self.order :], self.slope(output, call, latents)]
        known = self.sigmas[call + 1 - len(self._slopes) : call + 1]
        for number, slope in enumerate(self._slopes):
            others = known[:number] + known[number + 1 :]
            basis = Polynomial([1.0])
            for one in others:
                basis = basis * Polynomial([-one, 1.0]) / (known[number] - one)
            area = basis.integ()
            weight = float(area(self.sigmas[call + 1]) - area(self.sigmas[call]))
            latents = latents + weight * slope
        return latents
