"""Samplers of flow matching: the ODE along straight lines from noise to picture.

``d x / d spread`` is what the network predicts (arXiv:2209.03003, eq. 1), so the latents need no
scaling and start as plain noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.diffusion import FLOW, shifted
from ldm.schedulers.base import Sampler
from ldm.schedulers.dpm_solver import SDE, DPMSolver


class FlowSampler(Sampler):
    """``spreads``: the noise levels from about 1 down to 0, one more than there are steps."""

    spreads: list[float]
    predictions = (FLOW,)

    def shifted(self, even: torch.Tensor) -> list[float]:
        """Even spreads as the schedule shifts them."""
        return shifted(even, float(self.schedule.get("flow_shift", 1.0))).tolist()


class FlowEulerSampler(FlowSampler):
    """Euler's method, which on a straight line is DDIM too."""

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        # Even between the ends of the training's, and then shifted once more, as in diffusers.
        (last,) = self.shifted(torch.tensor([1 / self.train_steps], dtype=torch.float64))
        even = torch.linspace(1, last, steps, dtype=torch.float64)
        self.spreads = [*self.shifted(even), 0.0]
        self.timesteps = [spread * self.train_steps for spread in self.spreads[:-1]]

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """Along the slope to the next spread."""
        return latents + (self.spreads[call + 1] - self.spreads[call]) * output


class FlowSolverSampler(FlowSampler, DPMSolver):
    """DPM-Solver++(2M) with ``signal = 1 - spread``."""

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        even = torch.linspace(1 - 1 / self.train_steps, 0, steps + 1, dtype=torch.float64)
        self.spreads = self.shifted(even)
        self.levels = [(1 - spread, spread) for spread in self.spreads]
        # Whole numbers, as diffusers tells them; what is cut off is less than a timestep.
        self.timesteps = [float(int(spread * self.train_steps)) for spread in self.spreads[:-1]]

    def predicted(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """Down the whole slope."""
        return latents - self.spreads[call] * output


class FlowSolverSDESampler(SDE, FlowSolverSampler):
    """The same with fresh noise."""
