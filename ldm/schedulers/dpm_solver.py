"""DPM-Solver++(2M), and its SDE: second order in log(signal / noise) (arXiv:2211.01095)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ldm.diffusion import predicted_original
from ldm.schedulers.base import Sampler, spaced

FEW_STEPS = 15
"""Below as many, the last step is of first order even where it does not end at zero noise."""


class DPMSolverSampler(Sampler):
    """Two predictions of the original a step, the older one from memory (algorithm 2).

    ``lambda_min_clipped`` leaves out levels where ``log(signal / noise)`` is lower still;
    ``final_sigmas_type`` says whether the last step goes to ``zero`` noise or to timestep 0's.
    """

    smallest = 2.0**-24

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        self.timesteps = self._spaced()
        levels = [self.abar[int(t)] for t in self.timesteps]
        self.to_zero = schedule.get("final_sigmas_type", "zero") == "zero"
        self._levels = [*levels, 1.0 if self.to_zero else self.abar[0]]
        self._before: torch.Tensor | None = None

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """First order for the first step and where the end wants it, else second."""
        original, (abar, after) = self._original(output, call, latents), self._levels[call:][:2]
        kept = ((1 - after) / (1 - abar)) ** 0.5
        return kept * latents - after**0.5 * math.expm1(-self._width(call)) * original

    def _original(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """As the network predicts it; in a step of second order, as it will in half a step."""
        original = predicted_original(self.prediction, self._levels[call], latents, output)
        before, self._before = self._before, original
        if before is None or (call == len(self.timesteps) - 1 and self._plain_end):
            return original
        return original + self._width(call) / (2 * self._width(call - 1)) * (original - before)

    def _width(self, call: int) -> float:
        """Of a step, in lambda: infinite where it goes to zero noise."""
        abar, after = self._levels[call : call + 2]
        return half_log_snr(after) - half_log_snr(abar)

    @property
    def _plain_end(self) -> bool:
        return self.to_zero or len(self.timesteps) < FEW_STEPS

    def _spaced(self) -> list[float]:
        """As :func:`ldm.schedulers.base.spaced`, but below the clip, and without timestep 0."""
        clip = float(self.schedule.get("lambda_min_clipped", -math.inf))
        usable = sum(half_log_snr(one) >= clip for one in self.abar)
        if self.schedule.get("timestep_spacing") == "trailing":
            return spaced(self.schedule, self.steps, "trailing", usable=usable)
        return spaced(self.schedule, self.steps + 1, "linspace", usable=usable)[:-1]


class DPMSolverSDESampler(DPMSolverSampler):
    """SDE-DPM-Solver++(2M): each step forgets more of the latents, and adds fresh noise for it.

    That lets it mend what it took for the original when there was little to see.
    """

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """As :class:`DPMSolverSampler`'s, before the fresh noise."""
        original, (abar, after) = self._original(output, call, latents), self._levels[call:][:2]
        width = self._width(call)
        kept = ((1 - after) / (1 - abar)) ** 0.5 * math.exp(-width)
        return kept * latents - after**0.5 * math.expm1(-2 * width) * original

    def noise_scale(self, call: int) -> float:
        """What brings the noise back to its level; none at zero noise."""
        return (-(1 - self._levels[call + 1]) * math.expm1(-2 * self._width(call))) ** 0.5


def half_log_snr(abar: float) -> float:
    """``log(signal / noise)``, lambda in the paper: infinite where there is no noise."""
    return math.inf if abar == 1 else 0.5 * math.log(abar / (1 - abar))
