"""diffusers' schedulers behind the interface of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

from ldm.schedulers.base import Sampler

SCHEDULERS = {
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
}
"""The deterministic ones: diffusers' DDPM draws its noise itself."""


class ReferenceSampler(Sampler):
    """A diffusers scheduler, set up on a schedule."""

    def __init__(self, name: str, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        self.scheduler = SCHEDULERS[name].from_config({**schedule, "clip_sample": False})
        self.scheduler.set_timesteps(steps)
        self.timesteps = self.scheduler.timesteps.tolist()
        self.start_scale = float(self.scheduler.init_noise_sigma)

    def model_input(self, latents: torch.Tensor, call: int) -> torch.Tensor:
        """Diffusers' ``scale_model_input``."""
        return self.scheduler.scale_model_input(latents, self.scheduler.timesteps[call])

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """Diffusers' ``step``."""
        timestep = self.scheduler.timesteps[call]
        return self.scheduler.step(output, timestep, latents, return_dict=False)[0]
