"""The UNet that a training starts from."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from ldm.config import UnetShape


def random_unet(
    shape: UnetShape, *, latent_channels: int, latent_size: int, text_width: int
) -> UNet2DConditionModel:
    """An untrained text-conditioned UNet with attention on every level."""
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
