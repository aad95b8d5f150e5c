"""Exponential moving average of weights."""

from __future__ import annotations

import torch


class Ema:
    """Keeps an average of a module's trained parameters in float32, on their device.

    The decay rises with the optimizer step, ``min(decay, (1 + n) / (10 + n))``, so that a short run
    is not held at its start (as in TensorFlow's ``ExponentialMovingAverage``).
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        named = module.named_parameters()
        self._present = {name: one for name, one in named if one.requires_grad}
        self.average = {name: one.detach().float().clone() for name, one in self._present.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after optimizer step ``step``, 1 for the first."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        present = [self._present[name].detach().float() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), present, weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and the average; a second call undoes the first."""
        for name, parameter in self._present.items():
            held = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(held)
