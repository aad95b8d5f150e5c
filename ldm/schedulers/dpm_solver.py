"""DPM-Solver++(2M), and its SDE: second order in log(signal / noise) (arXiv:2211.01095)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from ldm.diffusion import predicted_original
from ldm.schedulers.base import Sampler, spaced

FEW_STEPS = 15
"""Below as many, the last step is of first order even where it does not end at zero noise."""


class DPMSolver(Sampler):
    """Two predictions of the original a step, the older one from memory (algorithm 2)."""

    levels: list[tuple[float, float]]
    """Signal and noise of the latents before each step, and after the last."""
    _before: torch.Tensor | None = None

    @abstractmethod
    def predicted(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """The original, by the network's output."""

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """First order for the first step and where the end wants it, else second."""
        (_, noise), (signal, after) = self.levels[call : call + 2]
        original = self._original(output, call, latents)
        return after / noise * latents - signal * math.expm1(-self.width(call)) * original

    def width(self, call: int) -> float:
        """Of a step, in lambda: infinite where it goes to zero noise."""
        before, after = self.levels[call : call + 2]
        return half_log_snr(*after) - half_log_snr(*before)

    def _original(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """As the network predicts it; in a step of second order, as it will in half a step."""
        original = self.predicted(output, call, latents)
        before, self._before = self._before, original
        if before is None or (call == len(self.timesteps) - 1 and self._plain_end):
            return original
        return original + self.width(call) / (2 * self.width(call - 1)) * (original - before)

    @property
    def _plain_end(self) -> bool:
        return self.levels[-1][1] == 0 or len(self.timesteps) < FEW_STEPS


class SDE(DPMSolver):
    """SDE-DPM-Solver++(2M): each step forgets more of the latents, and adds fresh noise for it.

    That lets it mend what it took for the original when there was little to see.
    """

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """As :class:`DPMSolver`'s, before the fresh noise."""
        (_, noise), (signal, after) = self.levels[call : call + 2]
        original, width = self._original(output, call, latents), self.width(call)
        kept = after / noise * math.exp(-width)
        return kept * latents - signal * math.expm1(-2 * width) * original

    def noise_scale(self, call: int) -> float:
        """What brings the noise back to its level; none at zero noise."""
        return self.levels[call + 1][1] * (-math.expm1(-2 * self.width(call))) ** 0.5


class DPMSolverSampler(DPMSolver):
    """Of variance-preserving diffusion.

    ``lambda_min_clipped`` leaves out levels where ``log(signal / noise)`` is lower still;
    ``final_sigmas_type`` says whether the last step goes to ``zero`` noise or to timestep 0's.
    """

    smallest = 2.0**-24

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        self.timesteps = self._spaced()
        to_zero = schedule.get("final_sigmas_type", "zero") == "zero"
        last = 1.0 if to_zero else self.abar[0]
        self.levels = [level_of(abar) for abar in (*map(self._abar, self.timesteps), last)]

    def predicted(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """By the kind of prediction."""
        abar = self._abar(self.timesteps[call])
        return predicted_original(self.prediction, abar, latents, output)

    def _abar(self, timestep: float) -> float:
        return self.abar[int(timestep)]

    def _spaced(self) -> list[float]:
        """As :func:`ldm.schedulers.base.spaced`, but below the clip, and without timestep 0."""
        clip = float(self.schedule.get("lambda_min_clipped", -math.inf))
        usable = sum(half_log_snr(*level_of(one)) >= clip for one in self.abar)
        if self.schedule.get("timestep_spacing") == "trailing":
            return spaced(self.schedule, self.steps, "trailing", usable=usable)
        return spaced(self.schedule, self.steps + 1, "linspace", usable=usable)[:-1]


class DPMSolverSDESampler(SDE, DPMSolverSampler):
    """The same with fresh noise."""


def level_of(abar: float) -> tuple[float, float]:
    """Signal and noise, whose squares make up 1."""
    return abar**0.5, (1 - abar) ** 0.5


def half_log_snr(signal: float, noise: float) -> float:
    """``log(signal / noise)``, lambda in the paper: infinite where there is no noise."""
    return math.inf if noise == 0 else math.log(signal / noise)
