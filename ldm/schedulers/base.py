"""What every sampler is: a walk down the noise levels, a step for each output of the network.

    sampler = EulerSampler(schedule, steps=20)
    latents = noise * sampler.start_scale
    for call, timestep in enumerate(sampler.timesteps):
        output = unet(sampler.model_input(latents, call), timestep, states)
        latents = sampler.step(output, call, latents)
        latents = latents + sampler.noise_scale(call) * fresh_noise

``schedule`` is a diffusers scheduler configuration. Coefficients are float64 numbers; latents keep
their dtype. Multistep samplers remember earlier outputs: make a new one for each batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ldm.diffusion import alphas_cumprod
from ldm.errors import UserError

OTHERS: tuple[str, ...] = (
    *("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("use_lu_lambdas", "use_flow_sigmas", "trained_betas"),
)
"""Options of diffusers' schedulers that ours do not have."""


class Sampler(ABC):
    """A reverse process in ``steps`` steps on one noise schedule."""

    start_scale = 1.0
    """Standard deviation of the latents that it starts from."""
    timesteps: list[float]
    """What the network is told, a number a call of it, falling."""

    predictions: tuple[str, ...] = ("epsilon", "v_prediction")
    """Of the network, that it can follow."""
    lacks = OTHERS
    """Options of the schedule that it cannot follow."""
    smallest = 0.0
    """What ``abar`` is at least: divisions want more than the nothing of a zero terminal SNR."""

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        """Raises :class:`UserError` for a schedule or a number of steps that it cannot follow."""
        self.schedule, self.steps = schedule, steps
        self.prediction = str(schedule.get("prediction_type", "epsilon"))
        self.train_steps = int(schedule["num_train_timesteps"])
        if steps > self.train_steps:
            raise UserError(
                f"steps {steps}: too many for a schedule of {self.train_steps}; ask for fewer"
            )
        if self.prediction not in self.predictions:
            raise UserError(
                f"scheduler: prediction_type {self.prediction!r} is not known to this sampler; it "
                f"follows {', '.join(self.predictions)}"
            )
        for option in self.lacks:
            if schedule.get(option):
                raise UserError(f"scheduler: {option} is set; use implementation diffusers")

    @cached_property
    def abar(self) -> list[float]:
        """``abar`` of each timestep of the schedule."""
        return [max(level, self.smallest) for level in alphas_cumprod(self.schedule).tolist()]

    def model_input(self, latents: torch.Tensor, call: int) -> torch.Tensor:
        """The latents as the network wants them for this call: of about unit variance."""
        return latents

    @abstractmethod
    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """The latents at the next lower noise level; calls count from 0, in order."""

    def noise_scale(self, call: int) -> float:
        """Standard deviation of the fresh noise to add after a step: 0 where deterministic."""
        return 0.0


def spaced(
    schedule: Mapping[str, Any],
    steps: int,
    default: str,
    *,
    whole: bool = True,
    usable: int | None = None,
) -> list[float]:
    """Falling timesteps by ``timestep_spacing`` (arXiv:2305.08891, table 2).

    ``linspace`` has both ends, ``leading`` ends at the first timestep (plus ``steps_offset``),
    ``trailing`` begins at the last. Rounded where ``whole``. Of the schedule's timesteps the first
    ``usable`` alone, by default all; where fewer than ``steps`` fit below, there are fewer.
    :class:`UserError` if some would be the same or out of the schedule.
    """
    total = int(schedule["num_train_timesteps"])
    end = total if usable is None else usable
    spacing = schedule.get("timestep_spacing", default)
    falling: np.ndarray
    if spacing == "linspace":
        rising = np.linspace(0.0, end - 1, steps)
        falling = (rising.round() if whole else rising)[::-1]
    elif spacing == "leading":
        offset = float(schedule.get("steps_offset", 0))
        falling = np.arange(steps)[::-1] * (end // steps) + offset
    elif spacing == "trailing":
        falling = (end - np.arange(steps) * total / steps).round() - 1
    else:
        raise UserError(
            f"scheduler: timestep_spacing {spacing!r} is not known; set linspace, leading or "
            "trailing"
        )
    timesteps = [float(t) for t in falling if t >= 0]
    distinct = len(set(timesteps)) == len(timesteps)
    if not timesteps or not distinct or timesteps[0] > total - 1:
        raise UserError(f"steps {steps}: too many for a schedule of {total}; ask for fewer")
    return timesteps
