"""What every sampler is: a walk down the noise levels, a step for each output of the network.

    sampler = EulerSampler(schedule, steps=20)
    latents = noise * sampler.start_scale
    for call, timestep in enumerate(sampler.timesteps):
        output = unet(sampler.model_input(latents, call), timestep, states)
        latents = sampler.step(output, call, latents)

``schedule`` is a diffusers scheduler configuration. Coefficients are float64 numbers; latents keep
their dtype. Multistep samplers remember earlier outputs: make a new one for each batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ldm.diffusion import alphas_cumprod


class Sampler(ABC):
    """A reverse process in ``steps`` steps on one noise schedule."""

    stochastic = False
    """Whether :meth:`step` wants fresh noise, of the latents' shape."""
    start_scale = 1.0
    """Standard deviation of the latents that it starts from."""
    timesteps: list[float]
    """What the network is told, a number a call of it, falling."""

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        assert steps >= 1
        self.schedule, self.steps = schedule, steps
        self.prediction = str(schedule.get("prediction_type", "epsilon"))
        self.train_steps = int(schedule["num_train_timesteps"])
        self.abar: list[float] = alphas_cumprod(schedule).tolist()

    def model_input(self, latents: torch.Tensor, call: int) -> torch.Tensor:
        """The latents as the network wants them for this call: of about unit variance."""
        return latents

    @abstractmethod
    def step(
        self,
        output: torch.Tensor,
        call: int,
        latents: torch.Tensor,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The latents at the next lower noise level; calls count from 0, in order."""


def spaced(
    schedule: Mapping[str, Any], steps: int, default: str, *, whole: bool = True
) -> list[float]:
    """Falling timesteps by ``timestep_spacing`` (arXiv:2305.08891, table 2).

    ``linspace`` has both ends, ``leading`` ends at the first timestep (plus ``steps_offset``),
    ``trailing`` begins at the last. Rounded where ``whole``.
    """
    total = int(schedule["num_train_timesteps"])
    spacing = schedule.get("timestep_spacing", default)
    if spacing == "linspace":
        rising = np.linspace(0, total - 1, steps)
        return [float(t) for t in (rising.round() if whole else rising)[::-1]]
    if spacing == "leading":
        rising = np.arange(steps) * (total // steps) + schedule.get("steps_offset", 0)
        return [float(t) for t in rising[::-1]]
    assert spacing == "trailing", spacing
    return [float(t) for t in np.arange(total, 0, -total / steps).round() - 1]
