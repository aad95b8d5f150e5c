"""Group normalization that leaves a compiled network's feature maps in the order they are in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class GroupNorm(nn.GroupNorm):
    """(n, c, h, w) to the same, float32 under autocast (arXiv:1803.08494).

    On a GPU PyTorch's own turns channels-last features around, there and back, at each norm.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Of float32 weights where it is compiled."""
        if not torch.compiler.is_compiling():
            return super().forward(features)
        inputs = (features, self.weight, self.bias, self.num_groups, self.eps)
        return _Normalized.apply(*inputs)  # type: ignore[no-untyped-call]


class _Normalized(torch.autograd.Function):
    """Both ways by sums over each channel, which a GPU reads in the order of channels-last memory.

    In operators that compile into a few kernels; uncompiled it would be slow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        groups: int,
        eps: float,
    ) -> torch.Tensor:
        """Moments of a group are those of its channels, together (total variance)."""
        grouped = features.unflatten(1, (groups, -1)).float()
        variances, means = torch.var_mean(grouped, (3, 4), correction=0, keepdim=True)
        spread, mean = torch.var_mean(means, 2, correction=0, keepdim=True)
        inverse = torch.rsqrt(variances.mean(2, keepdim=True) + spread + eps)
        ctx.save_for_backward(features, weight, mean, inverse)
        normed = ((grouped - mean) * inverse).flatten(1, 2)
        return normed * weight[:, None, None] + bias[:, None, None]

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        """At x, normed to y = (x - m) r, it is r (g - mean(g) - y mean(g y)) for g at y."""
        features, weight, mean, inverse = ctx.saved_tensors
        n, c, h, w = features.shape
        groups = mean.shape[1]

        def by_group(channels: torch.Tensor) -> torch.Tensor:
            return channels.unflatten(-1, (groups, -1))

        def to_channels(values: torch.Tensor) -> torch.Tensor:
            return values.expand(n, groups, c // groups).flatten(1)[:, :, None, None]

        sums = by_group(gradient.sum((2, 3)))
        products = by_group((gradient * features).sum((2, 3)))
        m, r = mean[..., 0, 0], inverse[..., 0, 0]
        for_weight = (products - sums * m) * r
        scale, count = by_group(weight), h * w * (c // groups)
        mean_g = (sums * scale).sum(2, keepdim=True) / count
        mean_gy = (for_weight * scale).sum(2, keepdim=True) / count
        slope = -r * r * mean_gy
        for_features = (
            gradient * to_channels(r * scale)
            + features * to_channels(slope)
            - to_channels(slope * m + r * mean_g)
        )
        for_bias = sums.flatten(1).sum(0)
        return for_features, for_weight.flatten(1).sum(0), for_bias, None, None
