"""PNDM: pseudo numerical methods on DDIM's transfer (arXiv:2202.09778)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from ldm.diffusion import predicted_noise
from ldm.errors import UserError
from ldm.schedulers.base import Sampler, spaced

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the newest outputs, the newest first (eq. 12)."""
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
"""Weights of the four outputs of a step (eq. 13)."""
START = 3
"""Runge-Kutta steps before the linear multistep method has its four outputs."""


class PNDMSampler(Sampler):
    """Linear multistep (PLMS), begun by Runge-Kutta or, with ``skip_prk_steps``, by itself.

    Runge-Kutta calls the network four times a step, for three steps. Without it the second step is
    taken twice, as latent diffusion does.
    """

    smallest = 2.0**-24

    def __init__(self, schedule: Mapping[str, Any], steps: int) -> None:
        super().__init__(schedule, steps)
        self.stride = self.train_steps // steps
        self._last = 1.0 if schedule.get("set_alpha_to_one", False) else self.abar[0]
        self._outputs: list[torch.Tensor] = []
        falling = [int(t) for t in spaced(schedule, steps, "leading")]
        if schedule.get("skip_prk_steps", False):
            self._start_calls = 0
            self.timesteps = [*falling[:2], *falling[1:]]
        else:
            if steps <= START:
                raise UserError(f"pndm: {steps} steps are too few for Runge-Kutta; take 4 or more")
            half = self.stride // 2
            begin = [
                t
                for here, after in pairwise(falling[: START + 1])
                for t in (here, after + half, after + half, after)
            ]
            self._start_calls = len(begin)
            self.timesteps = [*begin, *falling[START:]]

    def step(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        """The latents that the next call wants."""
        if call < self._start_calls:
            return self._runge_kutta(output, call, latents)
        return self._multistep(output, call, latents)

    def _runge_kutta(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        first, stage = call - call % 4, call % 4
        if stage == 0:
            self._origin, self._sum = latents, torch.zeros_like(output)
            self._outputs.append(output)
        self._sum = self._sum + RUNGE_KUTTA[stage] * output
        to = int(self.timesteps[call]) - (0 if stage % 2 else self.stride // 2)
        slope = self._sum if stage == 3 else output
        return self._transfer(self._origin, slope, int(self.timesteps[first]), to)

    def _multistep(self, output: torch.Tensor, call: int, latents: torch.Tensor) -> torch.Tensor:
        timestep = int(self.timesteps[call])
        if self._start_calls == 0 and call == 1:
            # The first step again, now with the mean of its two ends.
            slope = (output + self._outputs[-1]) / 2
            return self._transfer(self._origin, slope, timestep + self.stride, timestep)
        if call == 0:
            self._origin = latents
        self._outputs = [*self._outputs[-3:], output]
        weights = ADAMS_BASHFORTH[len(self._outputs)]
        slope = sum(
            (weight * one for weight, one in zip(weights, self._outputs[::-1], strict=True)),
            start=torch.zeros_like(output),
        )
        return self._transfer(latents, slope, timestep, timestep - self.stride)

    def _transfer(
        self, latents: torch.Tensor, output: torch.Tensor, timestep: int, to: int
    ) -> torch.Tensor:
        """From one level to another along a slope (eq. 11), which is an output of the network."""
        abar, after = self.abar[timestep], self.abar[to] if to >= 0 else self._last
        noise = predicted_noise(self.prediction, abar, latents, output)
        scale = abar * (1 - after) ** 0.5 + (abar * (1 - abar) * after) ** 0.5
        return (after / abar) ** 0.5 * latents - (after - abar) / scale * noise
