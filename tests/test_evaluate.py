"""What a model is held against: exactly what its training started from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ldm.config import Evaluate, EvaluationSampling, Pretrained, Train
from ldm.errors import UserError
from ldm.evaluate import evaluate
from ldm.images import decode_image
from ldm.models import Source
from ldm.pipeline import load_unet
from ldm.sampling import Painter, Request
from ldm.scenes.lists import prompts
from ldm.train.stage import train

SAMPLING = EvaluationSampling(steps=2, seed=5)


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts(1)))
    return path


def trained(pipeline: Path, latents: Path, folder: Path, **settings: object) -> Path:
    short = {"steps": 2, "batch_size": 4, "mixed_precision": "no"}
    config = Train.model_validate({**short, **settings})
    train(config, Pretrained(pipeline=str(pipeline)), latents, folder / "model", folder / "runs")
    return folder / "model"


def evaluated(pipeline: Path, model: Path, prompts_file: Path) -> Path:
    config = Evaluate(sampling=SAMPLING)
    pretrained = Pretrained(pipeline=str(pipeline), clip=str(pipeline / "clip"))
    evaluate(config, pretrained, model, prompts_file, model.parent / "eval")
    return model.parent / "eval"


@pytest.mark.parametrize("settings", [{}, {"text_learning_rate": 1e-2}])
def test_the_start_is_the_one_of_the_training(
    pipeline: Path, latents: Path, tmp_path: Path, prompts_file: Path, settings: dict[str, float]
) -> None:
    """Started from a model of one's own, not from the pretrained one."""
    first = trained(pipeline, latents, tmp_path / "first", learning_rate=1e-2)
    second = trained(pipeline, latents, tmp_path / "second", init=str(first), **settings)
    folder = evaluated(pipeline, second, prompts_file)
    asked = [json.loads(line)["prompt"] for line in prompts_file.read_text().splitlines()]
    requests = [Request(prompt, 5 + number) for number, prompt in enumerate(asked)]
    for model, name in ((first, "start"), (second, "model")):
        drawn = Painter.load(Source(str(model))).draw(requests, SAMPLING)
        for number, picture in enumerate(drawn):
            stored = decode_image((folder / name / f"{number:03d}.png").read_bytes())
            assert np.array_equal(picture, stored)


def test_a_start_from_random_weights_is_drawn_too(
    pipeline: Path, latents: Path, tmp_path: Path, prompts_file: Path
) -> None:
    shape = {"widths": [16, 16], "head_width": 8, "norm_groups": 4}
    model = trained(pipeline, latents, tmp_path, init="random", unet=shape, seed=3)
    metrics = json.loads((evaluated(pipeline, model, prompts_file) / "metrics.json").read_text())
    assert metrics["start"].keys() == metrics.keys() - {"start", "val_loss"}


def test_a_start_that_has_changed_is_refused(
    pipeline: Path, latents: Path, tmp_path: Path, prompts_file: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(pipeline, own)
    model = trained(own, latents, tmp_path)
    path = own / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] += 1
    save_file(weights, path, {"format": "pt"})
    assert load_unet(Source(str(own)))
    with pytest.raises(UserError, match=r"train\.init 'pretrained' is now; run `ldm train` again"):
        evaluated(own, model, prompts_file)
    assert not (tmp_path / "eval").exists()
