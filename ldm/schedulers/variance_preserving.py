"""DDPM and DDIM: signal and noise always make up unit variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.diffusion import predicted_noise, predicted_original
from ldm.schedulers.base import Sampler, spaced


class DDPMSampler(Sampler):
    """Ancestral sampling with the posterior's own variance (arXiv:2006.11239, eqs. 6 and 7)."""

    stochastic = True

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        self.timesteps = spaced(schedule, steps, "leading")
        self._levels = [*(self.abar[int(t)] for t in self.timesteps), 1.0]

    def step(
        self,
        output: torch.Tensor,
        call: int,
        latents: torch.Tensor,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draw from the posterior given the predicted original; none is drawn at timestep 0."""
        abar, after = self._levels[call : call + 2]
        alpha = abar / after
        original = predicted_original(self.prediction, abar, latents, output)
        mean = after**0.5 * (1 - alpha) / (1 - abar) * original
        mean = mean + alpha**0.5 * (1 - after) / (1 - abar) * latents
        if self.timesteps[call] == 0:
            return mean
        assert noise is not None, "ancestral sampling needs noise"
        variance = max((1 - after) / (1 - abar) * (1 - alpha), 1e-20)
        return mean + variance**0.5 * noise


class DDIMSampler(Sampler):
    """The deterministic process with DDPM's marginals (arXiv:2010.02502, eq. 12 with sigma 0)."""

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        self.timesteps = spaced(schedule, steps, "leading")
        self._last = 1.0 if schedule.get("set_alpha_to_one", True) else self.abar[0]

    def step(
        self,
        output: torch.Tensor,
        call: int,
        latents: torch.Tensor,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predicted original and predicted noise, mixed as the next level has them."""
        timestep = int(self.timesteps[call])
        before = timestep - self.train_steps // self.steps
        abar, after = self.abar[timestep], self.abar[before] if before >= 0 else self._last
        original = predicted_original(self.prediction, abar, latents, output)
        direction = predicted_noise(self.prediction, abar, latents, output)
        return after**0.5 * original + (1 - after) ** 0.5 * direction
