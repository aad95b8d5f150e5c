"""Samplers of flow matching: the ODE along straight lines from noise to picture.

``d x / d spread`` is what the network predicts (arXiv:2209.03003, eq. 1), so the latents need no
scaling and start as plain noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ldm.diffusion import FLOW, shifted
from ldm.schedulers.base import Sampler


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


class FlowSolverSampler(FlowSampler):
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2) with ``signal = 1 - spread``."""

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        even = torch.linspace(1 - 1 / self.train_steps, 0, steps + 1, dtype=torch.float64)
        self.spreads = self.shifted(even)
        # Whole numbers, as diffusers tells them; what is cut off is less than a timestep.
        self.timesteps = [float(int(spread * self.train_steps)) for spread in self.spreads[:-1]]
        self._before: torch.Tensor | None = None

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """First order for the first step and the last, else second."""
        spread, after = self.spreads[call : call + 2]
        original = latents - spread * output
        before, self._before = self._before, original
        width = self._log_ratio(call + 1) - self._log_ratio(call)
        if before is not None and after > 0:
            past = self._log_ratio(call) - self._log_ratio(call - 1)
            original = original + width / (2 * past) * (original - before)
        return after / spread * latents - (1 - after) * math.expm1(-width) * original

    def _log_ratio(self, call: int) -> float:
        """``log(signal / spread)``, lambda in the paper: infinite where there is no noise."""
        spread = self.spreads[call]
        return math.inf if spread == 0 else math.log((1 - spread) / spread)
