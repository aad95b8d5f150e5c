"""Attention: within the picture, from the picture to the text, and the transformer around both.

Tokens are (n, tokens, width). Attributes carry diffusers' names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ldm.nn.convolution import Conv2d
from ldm.nn.norm import GroupNorm


class Attention(nn.Module):
    """Multi-head attention from ``tokens`` to ``context`` (arXiv:1706.03762, eq. 1)."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """(n, t, width) looking at (n, s, context_width) to (n, t, width)."""
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out[0](attended.transpose(1, 2).flatten(-2))


class GatedLinear(nn.Module):
    """GEGLU: one half of a projection, gated by the GELU of the other (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, t, width) to (n, t, hidden)."""
        hidden, gate = self._halves(tokens)
        return hidden * F.gelu(gate)

    def _halves(self, tokens: torch.Tensor) -> Sequence[torch.Tensor]:
        """Compiled, each by itself: a kernel that joins their gradients takes thrice as long.

        An adapter in place of the projection computes them together all the same.
        """
        if torch.compiler.is_compiling() and isinstance(self.proj, nn.Linear):
            halves = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
            return [F.linear(tokens, weight, bias) for weight, bias in halves]
        return self.proj(tokens).chunk(2, dim=-1)


class FeedForward(nn.Module):
    """Four times as wide inside, token by token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The second place is a dropout in diffusers' numbering; it has no weights.
        self.net = nn.ModuleList(
            [GatedLinear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, t, width) to the same."""
        return self.net[2](self.net[0](tokens))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each normed first and added."""

    def __init__(self, width: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, text_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """``states`` are the text's, (n, s, text_width)."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, normed)
        tokens = tokens + self.attn2(self.norm2(tokens), states)
        return tokens + self.ff(self.norm3(tokens))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (arXiv:2112.10752, section 3.3)."""

    def __init__(
        self, channels: int, text_width: int, heads: int, depth: int, groups: int, linear: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        project = nn.Linear if linear else lambda width, out: Conv2d(width, out, 1)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, text_width, heads) for _ in range(depth)
        )
        self.proj_out = project(channels, channels)

    def forward(self, features: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Features (n, c, h, w) that have looked at each other and at the text."""
        size = features.shape[-2:]
        hidden = self.norm(features)
        if self.linear:
            tokens = self.proj_in(hidden.flatten(2).transpose(1, 2))
        else:
            tokens = self.proj_in(hidden).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, states)
        if self.linear:
            hidden = self.proj_out(tokens).transpose(1, 2).unflatten(-1, size)
        else:
            hidden = self.proj_out(tokens.transpose(1, 2).unflatten(-1, size))
        return hidden + features
