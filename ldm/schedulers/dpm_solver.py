"""DPM-Solver++(2M): second order in the log signal-to-noise ratio (arXiv:2211.01095)."""

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
        abar, after = self._levels[call : call + 2]
        original = predicted_original(self.prediction, abar, latents, output)
        before, self._before = self._before, original
        width = half_log_snr(after) - half_log_snr(abar)
        if before is not None and not (call == len(self.timesteps) - 1 and self._plain_end):
            past = half_log_snr(abar) - half_log_snr(self._levels[call - 1])
            original = original + width / (2 * past) * (original - before)
        kept = ((1 - after) / (1 - abar)) ** 0.5
        return kept * latents - after**0.5 * math.expm1(-width) * original

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


def half_log_snr(abar: float) -> float:
    """``log(signal / noise)``, lambda in the paper: infinite where there is no noise."""
    return math.inf if abar == 1 else 0.5 * math.log(abar / (1 - abar))
