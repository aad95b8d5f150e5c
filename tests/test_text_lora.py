"""Adapters in the text encoder too: what they change, who can read them, and what they resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ldm.config import Lora
from ldm.errors import UserError
from ldm.lora import DIFFUSERS, KOHYA
from ldm.models import Source
from ldm.pipeline import load_model
from tests.test_lora import adapted, assert_resumes, checkpoint_of, output
from tests.test_train import run_here, text_weights, weights

BOTH: dict[str, Any] = {"learning_rate": 1e-2, "text_learning_rate": 1e-2, "schedule": "constant"}
ALL_KINDS = ["q_proj", "out_proj", "fc1", "fc2"]


def states(text_encoder: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = text_encoder(torch.arange(40).reshape(2, 20)).last_hidden_state
    return hidden


@pytest.mark.parametrize("targets", [None, ALL_KINDS])
def test_only_adapters_are_trained(
    pipeline: Path, latents: Path, tmp_path: Path, targets: list[str] | None
) -> None:
    """What comes out is the start, but for the sum in adapted layers of both networks."""
    lora = {"rank": 2, "alpha": 3, **({"text_targets": targets} if targets else {})}
    model = run_here(pipeline, latents, tmp_path, lora=lora, **BOTH)
    alone = load_file(model / "lora" / DIFFUSERS)
    before, after = text_weights(pipeline), text_weights(model)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if not adapted(name, tuple(targets or Lora().text_targets)):
            assert torch.equal(after[name], tensor), name
            continue
        inner = name.removeprefix("text_model.").removesuffix(".weight")
        layer = f"text_encoder.text_model.{inner}"
        up, down = (alone.pop(f"{layer}.lora_{side}.weight") for side in "BA")
        torch.testing.assert_close(after[name], tensor + 1.5 * up @ down)
        assert not torch.equal(after[name], tensor), name
    assert alone and all(name.startswith("unet.") for name in alone)
    unet = weights(pipeline)
    moved = {name for name, one in weights(model).items() if not one.equal(unet[name])}
    assert moved == {name for name in unet if adapted(name)}


@pytest.mark.parametrize("file", [DIFFUSERS, KOHYA])
def test_diffusers_puts_the_adapters_on_the_start(
    pipeline: Path, latents: Path, tmp_path: Path, file: str
) -> None:
    lora = {"rank": 4, "alpha": 32, "text_targets": ALL_KINDS}
    model = run_here(pipeline, latents, tmp_path, lora=lora, **BOTH)
    ours = StableDiffusionPipeline.from_pretrained(model)
    theirs = StableDiffusionPipeline.from_pretrained(pipeline)
    for part, made in (("text_encoder", states), ("unet", output)):
        plain, wanted = made(getattr(theirs, part)), made(getattr(ours, part))
        assert float((wanted - plain).abs().max()) > 0.05
    theirs.load_lora_weights(model / "lora", weight_name=file)
    for part, made in (("text_encoder", states), ("unet", output)):
        found, wanted = made(getattr(theirs, part)), made(getattr(ours, part))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_kohya_has_the_names_of_a_lone_text_encoder(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    model = run_here(pipeline, latents, tmp_path, lora={}, steps=1, **BOTH)
    found = {name.split(".")[0] for name in load_file(model / "lora" / KOHYA)}
    texts = {name for name in found if not name.startswith("lora_unet_")}
    inner = (name.partition(".layers.")[2] for name in text_weights(pipeline))
    layers = {int(name[0]) for name in inner if name}
    assert texts == {
        f"lora_te_text_model_encoder_layers_{layer}_self_attn_{target}"
        for layer in layers
        for target in Lora().text_targets
    }


def test_a_training_resumes_bit_for_bit(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora": {"dropout": 0.3}, "checkpoint_every": 7, **BOTH}
    last = assert_resumes(pipeline, latents, tmp_path, **settings)
    assert any(name.startswith("text_encoder.") for name in load_file(last / "ema.safetensors"))


def test_a_checkpoint_is_the_finished_model(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    """Beside the text encoder that the training started from, and no other."""
    base = tmp_path / "base"
    shutil.copytree(pipeline, base)
    model = run_here(base, latents, tmp_path, lora={"alpha": 40}, **BOTH)
    checkpoint = Source(str(checkpoint_of(tmp_path)))
    wanted = load_model(Source(str(model)))[0].text_encoder
    assert torch.equal(states(load_model(checkpoint)[0].text_encoder), states(wanted))

    other = base / "text_encoder" / "model.safetensors"
    changed = load_file(other)
    name = next(name for name in changed if name.endswith("fc1.bias"))
    changed[name] += 1
    save_file(changed, other, {"format": "pt"})
    with pytest.raises(UserError, match=r"has another text encoder than .*train again"):
        load_model(checkpoint)


def test_without_text_targets_the_text_encoder_stays(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    model = run_here(pipeline, latents, tmp_path, lora={})
    before = text_weights(pipeline)
    assert all(one.equal(before[name]) for name, one in text_weights(model).items())
    found = load_file(model / "lora" / DIFFUSERS)
    assert found and all(name.startswith("unet.") for name in found)


def test_targets_that_are_no_layers_are_named(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    words = r"train\.lora\.text_targets: to_q names no .* of the text encoder; .* as q_proj"
    with pytest.raises(UserError, match=words):
        run_here(pipeline, latents, tmp_path, lora={"text_targets": ["to_q"]}, **BOTH)
    assert not (tmp_path / "model").exists()
