"""Adapters in the text encoder too: what they change, who can read them, and what they resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ldm.artifacts import opening
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


def double_text(pipeline: Path) -> None:
    path = pipeline / "text_encoder" / "model.safetensors"
    save_file({name: 2 * one for name, one in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("text", [{}, {"text_learning_rate": 1e-2}])
def test_a_checkpoint_is_the_finished_model(
    pipeline: Path, latents: Path, tmp_path: Path, text: dict[str, float]
) -> None:
    """Beside the UNet that the training started from, and the pipeline's text encoder."""
    base = tmp_path / "base"
    shutil.copytree(pipeline, base)
    start = run_here(base, latents, tmp_path / "start", learning_rate=1e-2)
    settings = {"learning_rate": 1e-2, "lora": {"alpha": 40}, "init": str(start), **text}
    model = run_here(base, latents, tmp_path, **settings)
    last, finished = Source(str(checkpoint_of(tmp_path))), load_model(Source(str(model)))
    drawn = load_model(last)
    assert torch.equal(states(drawn[0].text_encoder), states(finished[0].text_encoder))
    assert torch.equal(output(drawn[1]), output(finished[1]))
    double_text(base)
    with pytest.raises(UserError, match=r"base: has another text encoder than .*train again"):
        load_model(last)


def test_a_checkpoint_from_before_the_text_encoder_was_known_opens(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    run_here(pipeline, latents, tmp_path, lora={})
    last = checkpoint_of(tmp_path)
    about = json.loads((last.parent / "model.json").read_text())
    del about["lora"]["text_digest"], about["lora"]["lora"]["text_targets"]
    expected = output(load_model(Source(str(last)))[1])
    (last.parent / "model.json").write_text(json.dumps(about))
    assert torch.equal(output(load_model(Source(str(last)))[1]), expected)


def test_sheets_on_the_way_change_nothing(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    """They are drawn by the averaged adapters, with the text encoder that is trained."""
    models = [
        run_here(pipeline, latents, tmp_path / str(every), lora={}, sample_every=every, **BOTH)
        for every in (None, 5)
    ]
    assert list(tmp_path.glob("5/runs/*/samples-*.png"))
    manifests = [opening(model, "model", "train").files for model in models]
    assert manifests[0] == manifests[1]


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
