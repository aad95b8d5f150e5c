"""The UNet as the other rooms see it: from scratch or diffusers', on the same weights."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel

from ldm.config import UnetShape
from ldm.nn import UNet

Network: TypeAlias = UNet | UNet2DConditionModel


def denoise(
    unet: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """A network's output, of the latents' shape; see :class:`ldm.nn.UNet`."""
    output = unet(latents, timesteps, states)
    return output if isinstance(output, torch.Tensor) else output.sample


def run_by(network: str, unet: UNet2DConditionModel) -> Network:
    """The same weights run by our code, ``ldm``, or by ``diffusers``'."""
    return unet if network == "diffusers" else from_scratch(unet)


def from_scratch(unet: UNet2DConditionModel) -> UNet:
    """Our network around the very tensors of diffusers'; UserError if it is of another family."""
    with torch.device("meta"):
        ours = UNet(dict(unet.config))
    ours.load_state_dict(unet.state_dict(), assign=True)
    return ours.requires_grad_(True)


def as_diffusers(unet: Network) -> UNet2DConditionModel:
    """Diffusers' network around the very tensors of ours."""
    if isinstance(unet, UNet2DConditionModel):
        return unet
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(shape_of(unet))
    theirs.load_state_dict(unet.state_dict(), assign=True)
    return theirs


def shape_of(unet: Network) -> dict[str, Any]:
    """The content of the network's ``config.json``."""
    return unet.values if isinstance(unet, UNet) else dict(unet.config)


def random_like(unet: Network, seed: int) -> Network:
    """A network of the same kind and shape, from the random weights of :func:`random_unet`."""
    torch.manual_seed(seed)
    fresh = UNet2DConditionModel.from_config(shape_of(unet))
    return from_scratch(fresh) if isinstance(unet, UNet) else fresh


def random_unet(
    shape: UnetShape, *, latent_channels: int, latent_size: int, text_width: int, seed: int
) -> UNet2DConditionModel:
    """An untrained text-conditioned UNet with attention on every level."""
    torch.manual_seed(seed)
    depth = len(shape.widths)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=shape.widths,
        layers_per_block=shape.layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * depth,
        up_block_types=("CrossAttnUpBlock2D",) * depth,
        cross_attention_dim=text_width,
        # diffusers' name says width, its value is the number of heads.
        attention_head_dim=tuple(width // shape.head_width for width in shape.widths),
        norm_num_groups=shape.norm_groups,
    )
