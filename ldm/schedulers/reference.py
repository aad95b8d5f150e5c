"""diffusers' schedulers behind the interface of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

from ldm.diffusion import FLOW
from ldm.schedulers.base import Sampler

SCHEDULERS = {
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
}
"""The deterministic ones: diffusers' DDPM and SDE solvers draw their noise themselves."""
FLOW_SCHEDULERS = {
    "dpm++": DPMSolverMultistepScheduler,
    "euler": FlowMatchEulerDiscreteScheduler,
    "ddim": FlowMatchEulerDiscreteScheduler,
}


class ReferenceSampler(Sampler):
    """A diffusers scheduler, set up on a schedule."""

    predictions = (*Sampler.predictions, FLOW)
    lacks = ()

    def __init__(self, name: str, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        self.scheduler = self._scheduler(name)
        self.scheduler.set_timesteps(steps)
        self.timesteps = self.scheduler.timesteps.tolist()
        if self.prediction != FLOW:
            self.start_scale = float(self.scheduler.init_noise_sigma)

    def _scheduler(self, name: str) -> Any:
        if self.prediction != FLOW:
            return SCHEDULERS[name].from_config({**self.schedule, "clip_sample": False})
        kind = FLOW_SCHEDULERS[name]
        if kind is FlowMatchEulerDiscreteScheduler:
            return kind(self.train_steps, shift=self.schedule.get("flow_shift", 1.0))
        return kind.from_config({**self.schedule, "use_flow_sigmas": True})

    def model_input(self, latents: torch.Tensor, call: int) -> torch.Tensor:
        """Diffusers' ``scale_model_input``, which a flow does not have."""
        if self.prediction == FLOW:
            return latents
        return self.scheduler.scale_model_input(latents, self.scheduler.timesteps[call])

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """Diffusers' ``step``."""
        timestep = self.scheduler.timesteps[call]
        return self.scheduler.step(output, timestep, latents, return_dict=False)[0]
