"""DDPM and DDIM: signal and noise always make up unit variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.diffusion import predicted_noise, predicted_original
from ldm.schedulers.base import Sampler, spaced


class DDPMSampler(Sampler):
    """Ancestral sampling with the posterior's own variance (arXiv:2006.11239, eqs. 6 and 7)."""

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        self.timesteps = spaced(schedule, steps, "leading")
        self._levels = [*(self.abar[int(t)] for t in self.timesteps), 1.0]

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """The mean of the posterior given the predicted original."""
        abar, after = self._levels[call : call + 2]
        alpha = abar / after
        original = predicted_original(self.prediction, abar, latents, output)
        mean = after**0.5 * (1 - alpha) / (1 - abar) * original
        return mean + alpha**0.5 * (1 - after) / (1 - abar) * latents

    def noise_scale(self, call: int) -> float:
        """The posterior's own; none at timestep 0."""
        abar, after = self._levels[call : call + 2]
        return ((1 - after) / (1 - abar) * (1 - abar / after)) ** 0.5


class DDIMSampler(Sampler):
    """The deterministic process with DDPM's marginals (arXiv:2010.02502, eq. 12 with sigma 0)."""

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        self.timesteps = spaced(schedule, steps, "leading")
        self._last = 1.0 if schedule.get("set_alpha_to_one", True) else self.abar[0]

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """Predicted original and predicted noise, mixed as the next level has them."""
        timestep = int(self.timesteps[call])
        before = timestep - self.train_steps // self.steps
        abar, after = self.abar[timestep], self.abar[before] if before >= 0 else self._last
        original = predicted_original(self.prediction, abar, latents, output)
        direction = predicted_noise(self.prediction, abar, latents, output)
        return after**0.5 * original + (1 - after) ** 0.5 * direction
