"""The shape of a UNet, as diffusers writes it into ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ldm.errors import UserError

ATTENTION = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
ATTENTION |= {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
OTHERS = "set pretrained.network to diffusers"
"""What runs a UNet of another kind."""

FAMILY: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
"""Options of diffusers' class that this family leaves at their default; null is that too."""
ALIKE = {"mid_block_type": (FAMILY["mid_block_type"],)}
"""Where null is something else."""


@dataclass(frozen=True)
class UNetConfig:
    """A shape of the family of Stable Diffusion 1 and 2.

    ``widths``: channels of each level, the finest first. ``attends``: whether a level looks at the
    text. ``heads``: attention heads of each level. ``layers``: residual blocks of each level on the
    way down; there is one more on the way up. ``depths``: transformer blocks behind each of them.
    """

    sample_size: int
    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    attends: tuple[bool, ...]
    heads: tuple[int, ...]
    layers: tuple[int, ...]
    depths: tuple[int, ...]
    text_width: int
    groups: int
    eps: float
    cosine_first: bool
    frequency_shift: float
    linear_projection: bool

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """From the content of a ``config.json``; ``UserError`` names what is not of the family."""
        for name, default in FAMILY.items():
            if values.get(name, default) not in ALIKE.get(name, (default, None)):
                raise UserError(
                    f"unet: {name} is {values[name]!r}; only {default!r} is known here; {OTHERS}"
                )
        widths = tuple(values["block_out_channels"])
        levels = len(widths)

        def each(value: Any) -> tuple[Any, ...]:
            return tuple(value) if isinstance(value, list | tuple) else (value,) * levels

        try:
            attends = tuple(ATTENTION[kind] for kind in values["down_block_types"])
            back = tuple(ATTENTION[kind] for kind in values["up_block_types"])[::-1]
        except KeyError as error:
            raise UserError(f"unet: block type {error} is not known here; {OTHERS}") from error
        if attends != back:
            raise UserError(
                f"unet: up_block_types are not the mirror of down_block_types; {OTHERS}"
            )
        return cls(
            sample_size=values["sample_size"],
            in_channels=values["in_channels"],
            out_channels=values["out_channels"],
            widths=widths,
            attends=attends,
            # diffusers' older name says width, its value is the number of heads all the same.
            heads=each(values.get("num_attention_heads") or values["attention_head_dim"]),
            layers=each(values["layers_per_block"]),
            depths=each(values.get("transformer_layers_per_block", 1)),
            text_width=values["cross_attention_dim"],
            groups=values["norm_num_groups"],
            eps=values["norm_eps"],
            cosine_first=values["flip_sin_to_cos"],
            frequency_shift=values["freq_shift"],
            linear_projection=values.get("use_linear_projection", False),
        )
