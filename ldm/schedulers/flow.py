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
        original, (spread, after) = self._original(output, call, latents), self.spreads[call:][:2]
        return after / spread * latents - (1 - after) * math.expm1(-self._width(call)) * original

    def _original(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """As the network predicts it; in a step of second order, as it will in half a step."""
        original = latents - self.spreads[call] * output
        before, self._before = self._before, original
        if before is None or self.spreads[call + 1] == 0:
            return original
        return original + self._width(call) / (2 * self._width(call - 1)) * (original - before)

    def _width(self, call: int) -> float:
        """Of a step, in lambda: infinite where it goes to zero noise."""
        return self._log_ratio(call + 1) - self._log_ratio(call)

    def _log_ratio(self, call: int) -> float:
        """``log(signal / spread)``, lambda in the paper: infinite where there is no noise."""
        spread = self.spreads[call]
        return math.inf if spread == 0 else math.log((1 - spread) / spread)


class FlowSolverSDESampler(FlowSolverSampler):
    """SDE-DPM-Solver++(2M): each step forgets more of the latents, and adds fresh noise for it."""

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """As :class:`FlowSolverSampler`'s, before the fresh noise."""
        original, (spread, after) = self._original(output, call, latents), self.spreads[call:][:2]
        width = self._width(call)
        kept = after / spread * math.exp(-width)
        return kept * latents - (1 - after) * math.expm1(-2 * width) * original

    def noise_scale(self, call: int) -> float:
        """What brings the noise back to its level; none at zero noise."""
        return self.spreads[call + 1] * (-math.expm1(-2 * self._width(call))) ** 0.5
