"""What every level of the UNet is made of: time embedding, residual block, down- and upsampling.

Feature maps are (n, channels, h, w). Attributes carry diffusers' names, so that one state dict fits
both networks.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from ldm.nn.convolution import Conv2d
from ldm.nn.norm import GroupNorm


def sinusoidal(
    timesteps: torch.Tensor, width: int, *, cosine_first: bool, shift: float
) -> torch.Tensor:
    """Timesteps (n,) as waves of geometrically falling frequency: float32 (n, width), even width.

    Transformer positions (arXiv:1706.03762, section 3.5) as DDPM uses them, with the cosines before
    the sines if ``cosine_first``. The lowest frequency is ``10000 ** -(1 - 1 / (width / 2))`` with
    ``shift`` 0, and ``1 / 10000`` with ``shift`` 1.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - shift)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    waves = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=-1)


class TimeEmbedding(nn.Module):
    """Two linear layers from the waves to the embedding that every residual block adds."""

    def __init__(self, waves: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(waves, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        """(n, waves) to (n, width)."""
        return self.linear_2(F.silu(self.linear_1(waves)))


class ResidualBlock(nn.Module):
    """Two convolutions with the time embedding between them (DDPM, appendix B)."""

    def __init__(
        self, channels: int, out_channels: int, time_width: int, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels, eps)
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, features: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """``time`` is the embedding after its activation, (n, time_width)."""
        hidden = self.conv1(F.silu(self.norm1(features)))
        hidden = hidden + self.time_emb_proj(time)[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (features if self.conv_shortcut is None else self.conv_shortcut(features))


class Downsample(nn.Module):
    """Half the height and width, rounded up, by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(n, c, h, w) to (n, c, ceil(h / 2), ceil(w / 2))."""
        return self.conv(features)


class Upsample(nn.Module):
    """To a given height and width by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """(n, c, h, w) to (n, c, *size)."""
        if torch.compiler.is_compiling() and size == _doubled(features):
            return self.conv(_twice(features))
        return self.conv(F.interpolate(features, size=size, mode="nearest"))


def _doubled(features: torch.Tensor) -> torch.Size:
    h, w = features.shape[2:]
    return torch.Size((2 * h, 2 * w))


def _twice(features: torch.Tensor) -> torch.Tensor:
    """Each cell four times, in channels-last order; its way back compiles into a sum.

    That of an interpolation compiles into atomic additions, slower and in no certain order.
    """
    n, c, h, w = features.shape
    cells = features.permute(0, 2, 3, 1)[:, :, None, :, None]
    return cells.expand(n, h, 2, w, 2, c).reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
