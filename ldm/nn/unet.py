"""The UNet: down to the coarsest level, through the middle, and up again past the kept features.

Residual blocks alternate with transformers that look at the text (arXiv:2112.10752). The network
takes and gives the weights of diffusers' ``UNet2DConditionModel`` of the same shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError
from ldm.nn.attention import SpatialTransformer
from ldm.nn.config import UNetConfig
from ldm.nn.convolution import Conv2d
from ldm.nn.layers import Downsample, ResidualBlock, TimeEmbedding, Upsample, sinusoidal
from ldm.nn.norm import GroupNorm

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


class Block(nn.Module):
    """Residual blocks, each followed by a transformer where the level attends."""

    recomputes = False
    """Whether gradients are computed from a layer's inputs alone, by another forward pass."""

    def __init__(
        self, shape: UNetConfig, level: int, channels: list[int], transformers: int
    ) -> None:
        """``channels``: what each residual block takes. ``transformers``: after as many of them."""
        super().__init__()
        width, time_width = shape.widths[level], 4 * shape.widths[0]
        self.resnets = nn.ModuleList(
            ResidualBlock(one, width, time_width, shape.groups, shape.eps) for one in channels
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(
                *(width, shape.text_width, shape.heads[level], shape.depths[level]),
                *(shape.groups, shape.linear_projection),
            )
            for _ in range(transformers)
        )

    def layer(
        self, number: int, features: torch.Tensor, time: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """One residual block and its transformer, if it has one."""
        if self.recomputes and torch.is_grad_enabled():
            inputs = (number, features, time, states)
            return checkpoint(self._layer, *inputs, use_reentrant=False)
        return self._layer(number, features, time, states)

    def _layer(
        self, number: int, features: torch.Tensor, time: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        features = self.resnets[number](features, time)
        return self.attentions[number](features, states) if self.attentions else features


class DownBlock(Block):
    """A level on the way down."""

    def __init__(self, shape: UNetConfig, level: int) -> None:
        width = shape.widths[level]
        before = shape.widths[max(level - 1, 0)]
        channels = [before] + [width] * (shape.layers[level] - 1)
        super().__init__(shape, level, channels, len(channels) * shape.attends[level])
        last = level == len(shape.widths) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width)])

    def forward(
        self, features: torch.Tensor, time: torch.Tensor, states: torch.Tensor
    ) -> list[torch.Tensor]:
        """The features after each layer, to be kept; the last go on."""
        kept = []
        for number in range(len(self.resnets)):
            features = self.layer(number, features, time, states)
            kept.append(features)
        for downsample in self.downsamplers:
            kept.append(downsample(features))
        return kept


class MidBlock(Block):
    """The coarsest level: residual block, transformer, residual block."""

    def __init__(self, shape: UNetConfig) -> None:
        level = len(shape.widths) - 1
        super().__init__(shape, level, [shape.widths[level]] * 2, transformers=1)

    def forward(
        self, features: torch.Tensor, time: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """The features, of the same shape."""
        return self.resnets[1](self.layer(0, features, time, states), time)


class UpBlock(Block):
    """A level on the way up: each layer also sees features kept on the way down."""

    def __init__(self, shape: UNetConfig, level: int) -> None:
        widths, layers = shape.widths, shape.layers[level] + 1
        below = widths[min(level + 1, len(widths) - 1)]
        coming = [below] + [widths[level]] * (layers - 1)
        kept = [widths[level]] * (layers - 1) + [widths[max(level - 1, 0)]]
        channels = [one + other for one, other in zip(coming, kept, strict=True)]
        super().__init__(shape, level, channels, len(channels) * shape.attends[level])
        self.upsamplers = nn.ModuleList([Upsample(widths[level])] if level else [])

    def forward(
        self,
        features: torch.Tensor,
        kept: list[torch.Tensor],
        time: torch.Tensor,
        states: torch.Tensor,
    ) -> torch.Tensor:
        """Takes its layers' features off the end of ``kept``."""
        for number in range(len(self.resnets)):
            features = self.layer(number, torch.cat([features, kept.pop()], dim=1), time, states)
        for upsample in self.upsamplers:
            features = upsample(features, kept[-1].shape[-2:])
        return features


class UNet(nn.Module):
    """Noisy latents, their timesteps and the text's states to a prediction (see the objective)."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """``values`` is the content of a ``config.json``; UserError if it is of another family."""
        super().__init__()
        self.values = dict(values)
        self.config = shape = UNetConfig.read(values)
        levels = range(len(shape.widths))
        self.conv_in = Conv2d(shape.in_channels, shape.widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(shape.widths[0], 4 * shape.widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(shape, level) for level in levels)
        self.mid_block = MidBlock(shape)
        self.up_blocks = nn.ModuleList(UpBlock(shape, level) for level in reversed(levels))
        self.conv_norm_out = GroupNorm(shape.groups, shape.widths[0], shape.eps)
        self.conv_out = Conv2d(shape.widths[0], shape.out_channels, 3, padding=1)

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """Of the latents' shape (n, c, h, w).

        ``timesteps``: (n,), or one for all; ``states``: (n, tokens, text width).
        """
        time = F.silu(self.time_embedding(self._waves(latents, timesteps)))
        if torch.compiler.is_compiling() and latents.is_cuda:
            # What the matrix units of a GPU want; every layer keeps it.
            latents = latents.contiguous(memory_format=torch.channels_last)
        features = self.conv_in(latents)
        kept = [features]
        for down in self.down_blocks:
            kept += down(kept[-1], time, states)
        features = self.mid_block(kept[-1], time, states)
        for up in self.up_blocks:
            features = up(features, kept, time, states)
        assert not kept
        return self.conv_out(F.silu(self.conv_norm_out(features)))

    def enable_gradient_checkpointing(self) -> None:
        """Keep each layer's inputs alone for the way back (arXiv:1604.06174), as diffusers can."""
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            block.recomputes = True

    def _waves(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return sinusoidal(
            timesteps.to(latents.device).expand(len(latents)),
            self.config.widths[0],
            cosine_first=self.config.cosine_first,
            shift=self.config.frequency_shift,
        ).to(latents.dtype)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """Read a ``unet`` folder that this class or diffusers wrote; float32."""
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder}: has no {CONFIG} and {WEIGHTS}; give a `unet` folder")
        with torch.device("meta"):
            unet = cls(json.loads((folder / CONFIG).read_text()))
        weights = load_file(folder / WEIGHTS)
        try:
            unet.load_state_dict({name: one.float() for name, one in weights.items()}, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(
                f"{folder}: weights do not fit {CONFIG} ({reason}); give a folder whose files "
                "belong together"
            ) from error
        return unet

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that diffusers' ``UNet2DConditionModel.from_pretrained`` opens."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
        text = json.dumps(self.values, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG).write_text(text)
