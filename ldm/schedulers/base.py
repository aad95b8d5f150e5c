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
from ldm.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction")
OTHERS = (
    *("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("use_lu_lambdas", "use_flow_sigmas", "trained_betas"),
)
"""Options of diffusers' schedulers that ours do not have."""


class Sampler(ABC):
    """A reverse process in ``steps`` steps on one noise schedule."""

    stochastic = False
    """Whether :meth:`step` wants fresh noise, of the latents' shape."""
    start_scale = 1.0
    """Standard deviation of the latents that it starts from."""
    timesteps: list[float]
    """What the network is told, a number a call of it, falling."""

    smallest = 0.0
    """What ``abar`` is at least: divisions want more than the nothing of a zero terminal SNR."""

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        """Raises :class:`UserError` for a schedule or a number of steps that it cannot follow."""
        self.schedule, self.steps = schedule, steps
        self.prediction = str(schedule.get("prediction_type", "epsilon"))
        self.train_steps = int(schedule["num_train_timesteps"])
        if steps > self.train_steps:
            raise UserError(f"steps {steps}: too many for a schedule of {self.train_steps}")
        if self.prediction not in PREDICTIONS:
            raise UserError(f"scheduler: prediction_type {self.prediction!r} is not known")
        for option in OTHERS:
            if schedule.get(option):
                raise UserError(f"scheduler: {option} is set; use implementation diffusers")
        self.abar = [max(level, self.smallest) for level in alphas_cumprod(schedule).tolist()]

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
    falling: np.ndarray
    if spacing == "linspace":
        rising = np.linspace(0.0, total - 1, steps)
        falling = (rising.round() if whole else rising)[::-1]
    elif spacing == "leading":
        offset = float(schedule.get("steps_offset", 0))
        falling = np.arange(steps)[::-1] * (total // steps) + offset
    else:
        assert spacing == "trailing", spacing
        falling = (total - np.arange(steps) * total / steps).round() - 1
    return falling_timesteps(falling, total)


def falling_timesteps(found: np.ndarray, total: int) -> list[float]:
    """As numbers; :class:`UserError` if some are the same or out of the schedule."""
    timesteps = [float(t) for t in found]
    distinct = len(set(timesteps)) == len(timesteps)
    if not timesteps or not distinct or timesteps[0] > total - 1:
        raise UserError(f"steps {len(timesteps)}: too many for a schedule of {total}")
    return timesteps
