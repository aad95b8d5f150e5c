"""Exponential moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

EVERY = 4
"""Optimizer steps between two updates, each of which reads and writes all averages.

On a CPU that took 1 % of a training step of ``tiny``. Weights move little in so few steps: an
average over a thousand does not tell.
"""


class Ema:
    """Keeps an average of parameters, by name, in float32 on their device.

    The decay rises with the optimizer step n, ``min(decay, (1 + n) / (10 + n))``, so that a short
    run is not held at its start (as in TensorFlow's ``ExponentialMovingAverage``).
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float, steps: int) -> None:
        self.decay, self.steps = decay, steps
        self.upto = 0
        """The optimizer step of the last update."""
        self._present = dict(parameters)
        self.average = {name: one.detach().float().clone() for name, one in self._present.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step ``step``, 1 for the first: every ``EVERY`` steps move the average.

        And after the last of ``steps``; as far as the steps since the last update would have moved
        it towards the weights as they are now.
        """
        if step % EVERY and step != self.steps:
            return
        since = range(self.upto + 1, step + 1)
        self.upto = step
        kept = math.prod(min(self.decay, (1 + one) / (10 + one)) for one in since)
        present = [self._present[name].detach().float() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), present, 1 - kept)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and the average; a second call undoes the first."""
        for name, parameter in self._present.items():
            held = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(held)
