"""Convolution whose weights a compiled network computes with in the order of its feature maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Conv2d(nn.Conv2d):
    """PyTorch's. Compiled, its weights are turned around as they are cast, once for both ways."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Channels last where the features are."""
        last, turned = (
            one.is_contiguous(memory_format=torch.channels_last) for one in (features, self.weight)
        )
        if not last or turned or not torch.compiler.is_compiling():
            return super().forward(features)
        weight = _ChannelsLast.apply(self.weight)  # type: ignore[no-untyped-call]
        return self._conv_forward(features, weight, self.bias)


class _ChannelsLast(torch.autograd.Function):
    """The gradient comes in the parameter's order: else it is copied when it is accumulated."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.contiguous()
