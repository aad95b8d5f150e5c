"""The from-scratch UNet against diffusers' on the same weights: outputs and every gradient."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from ldm.errors import UserError
from ldm.models import tiny_folder
from ldm.nn import UNet
from ldm.unet import from_scratch

SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SHAPES: dict[str, dict[str, Any]] = {
    "SD 1's kinds of blocks": {},
    "SD 2: linear projections, heads by level": {
        "use_linear_projection": True,
        "attention_head_dim": (2, 4, 4),
    },
    "two blocks deep, layers by level": {
        "transformer_layers_per_block": 2,
        "layers_per_block": (1, 2, 1),
    },
    "one level": {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
    "other waves, epsilon and channels": {
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "in_channels": 9,
    },
}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def compare(
    reference: UNet2DConditionModel, folder: Path, size: tuple[int, int], limit: float
) -> None:
    reference.save_pretrained(folder)
    match_outputs_and_gradients(UNet.from_pretrained(folder), reference, size, limit)


def match_outputs_and_gradients(
    ours: UNet, reference: UNet2DConditionModel, size: tuple[int, int], limit: float
) -> None:
    shape = ours.config
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, shape.in_channels, *size, generator=generator)
    states = torch.randn(3, 7, shape.text_width, generator=generator)
    timesteps = torch.tensor([0, 417, 999])
    inputs = [(latents.clone().requires_grad_(), states.clone().requires_grad_()) for _ in "ab"]
    theirs = reference(inputs[0][0], timesteps, inputs[0][1]).sample
    mine = ours(inputs[1][0], timesteps, inputs[1][1])
    assert relative(mine, theirs) <= limit
    weights = torch.randn(theirs.shape, generator=generator)
    for output in (theirs, mine):
        (output * weights).sum().backward()
    for given, expected in zip(inputs[1], inputs[0], strict=True):
        assert relative(given.grad, expected.grad) <= limit
    gradients = {name: one.grad for name, one in ours.named_parameters()}
    known = dict(reference.named_parameters())
    assert gradients.keys() == known.keys()
    largest = max(float(one.grad.norm()) for one in known.values())
    for name, one in known.items():
        # A bias before a norm has no gradient but rounding.
        if one.grad.norm() > 1e-5 * largest:
            assert relative(gradients[name], one.grad) <= 10 * limit, name


@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_diffusers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = UNet2DConditionModel(**{**SMALL, **SHAPES[name]})
    compare(reference, tmp_path, (8, 8), 1e-5)


def test_it_equals_diffusers_where_sides_are_odd(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compare(UNet2DConditionModel(**SMALL), tmp_path, (9, 6), 1e-5)


def test_it_equals_diffusers_on_tiny(tmp_path: Path) -> None:
    reference = UNet2DConditionModel.from_pretrained(
        tiny_folder() / "unet", torch_dtype=torch.float32
    )
    compare(reference, tmp_path, (8, 8), 1e-5)


@pytest.mark.slow
def test_it_equals_diffusers_at_the_size_of_stable_diffusion_1() -> None:
    """860 million random weights, shared by both networks."""
    torch.manual_seed(0)
    reference = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, norm_num_groups=32
    )
    assert sum(one.numel() for one in reference.parameters()) == 859_520_964
    match_outputs_and_gradients(from_scratch(reference), reference, (8, 8), 1e-4)


def test_diffusers_opens_what_it_writes(tmp_path: Path) -> None:
    ours = UNet.from_pretrained(tiny_folder() / "unet")
    with torch.no_grad():
        ours.conv_out.bias += 1
    ours.save_pretrained(tmp_path)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == json.loads((tiny_folder() / "unet" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "'AttnDownBlock2D' is not known"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "not the mirror"),
    ],
)
def test_other_families_are_refused(change: Mapping[str, Any], told: str) -> None:
    values = {**dict(UNet2DConditionModel(**SMALL).config), **change}
    with pytest.raises(UserError, match=told):
        UNet(values)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    UNet2DConditionModel(**SMALL).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "cross_attention_dim": 32}))
    with pytest.raises(UserError, match=r"weights do not fit config\.json"):
        UNet.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="give a `unet` folder"):
        UNet.from_pretrained(tmp_path / "nothing")
