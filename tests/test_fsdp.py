"""A training whose weights are spread over processes is the training of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from ldm.artifacts import opening
from ldm.config import Train
from ldm.errors import UserError
from ldm.train import fsdp
from tests.launched import launch, wait_for
from tests.test_kills import has_done, kill_all, terminate
from tests.test_train import run_here

SPREAD = {"accelerate": "infra/accelerate/cpu-fsdp.yaml"}
SETTINGS: dict[str, Any] = {"steps": 16, "checkpoint_every": 8, "validate_every": 5}
SETTINGS |= {"log_every": 1, "accumulation": 2}
"""A step that validates is none that saves: saving would free what validation put together."""
SHEET = {"sample_every": 8, "sample_prompts": "[a red star]"}
CLOSE = {"weights": 2e-5, "ema": 2e-5, "optimizer": 1e-7}
"""How far, at most, the order of sums moves a number of each part of a checkpoint."""


@pytest.fixture(scope="module")
def spread(pipeline: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make that share the weights; ``model`` and ``runs``."""
    return launched(pipeline, latents, tmp_path_factory.mktemp("spread"), **SPREAD, **SHEET)


@pytest.fixture(scope="module")
def alone(pipeline: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    return launched(pipeline, latents, tmp_path_factory.mktemp("alone"), **SHEET)


def launched(pipeline: Path, latents: Path, folder: Path, **settings: object) -> Path:
    assert launch(pipeline, latents, folder, **{**SETTINGS, **settings}).wait() == 0
    return folder


def assert_alike(folder: Path, other: Path) -> None:
    """The same figures, and whole tensors of the same names, but for the order of sums."""
    for line, same in zip(*map(read_log, (folder, other)), strict=True):
        assert line == pytest.approx(same, rel=1e-5, abs=1e-4)
    for part, close in CLOSE.items():
        left, right = (load_file(last(one) / f"{part}.safetensors") for one in (folder, other))
        torch.testing.assert_close(left, right, rtol=1e-3, atol=close)
    left, right = (opening(one / "model", "model", "train") for one in (folder, other))
    assert left.files.keys() == right.files.keys()
    assert (left.config, left.inputs, left.counts) == (right.config, right.inputs, right.counts)


def read_log(folder: Path) -> list[dict[Any, float]]:
    lines = map(json.loads, (folder / "model" / "log.jsonl").read_text().splitlines())
    bands = "val_loss_bands"
    return [line | dict(enumerate(line.pop(bands, []))) for line in lines]


def last(folder: Path) -> Path:
    """The run's last checkpoint."""
    return max(folder.glob("runs/*/step-*"))


@pytest.mark.kills
def test_two_processes_that_share_the_weights_do_what_one_does(spread: Path, alone: Path) -> None:
    assert_alike(spread, alone)
    (drawn,), (same,) = (folder.glob("runs/*/samples-00000016.png") for folder in (spread, alone))
    difference = np.asarray(Image.open(drawn)).astype(int) - np.asarray(Image.open(same))
    assert abs(difference).mean() < 1
    loaded = StableDiffusionPipeline.from_pretrained(spread / "model", safety_checker=None)
    average = load_file(last(spread) / "ema.safetensors")
    for name, tensor in loaded.unet.state_dict().items():
        assert torch.equal(tensor, average[f"unet.{name}"])


@pytest.mark.kills
def test_so_does_diffusers_network_with_a_text_encoder(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(pipeline, start)
    own = UNet2DConditionModel.load_config(start / "unet")
    # One that our own network does not know.
    unet = UNet2DConditionModel.from_config({**own, "mid_block_type": None})
    unet.save_pretrained(start / "unet")
    more = {"text_learning_rate": 1e-4, "gradient_checkpointing": True, "init": start}
    for name, how in (("spread", SPREAD), ("alone", {})):
        launched(pipeline, latents, tmp_path / name, network="diffusers", **more, **how)
    assert_alike(tmp_path / "spread", tmp_path / "alone")
    texts = [
        load_file(tmp_path / name / "model" / "text_encoder" / "model.safetensors")
        for name in ("spread", "alone")
    ]
    torch.testing.assert_close(*texts, rtol=1e-3, atol=CLOSE["ema"])


@pytest.mark.kills
def test_a_sheet_that_was_left_undone_comes_before_the_first_step(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    settings = {**SPREAD, **SHEET, "keep_checkpoints": 9}
    launched(pipeline, latents, tmp_path, **settings)
    model, (sheet,) = tmp_path / "model", tmp_path.glob("runs/*/samples-00000008.png")
    files, drawn = opening(model, "model", "train").files, sheet.read_bytes()
    for path in (model, *tmp_path.glob("runs/*/step-*")):
        if path == model or int(path.name.removeprefix("step-")) > 8:
            shutil.rmtree(path)
    sheet.unlink()
    launched(pipeline, latents, tmp_path, **settings)
    assert opening(model, "model", "train").files == files
    assert sheet.read_bytes() == drawn


@pytest.mark.kills
def test_a_stop_breaks_a_sheet_off_in_all_processes(
    pipeline: Path, latents: Path, tmp_path: Path, spread: Path
) -> None:
    """Sixty pictures take a second at least; the step's line comes before them."""
    prompts = json.dumps([f"a red star {number}" for number in range(60)])
    settings = {**SPREAD, **SHEET, "sample_prompts": prompts}
    process = launch(pipeline, latents, tmp_path, **SETTINGS, **settings)
    wait_for(partial(has_done, tmp_path, 8), process)
    terminate(process)
    assert process.wait() == 143
    assert last(tmp_path).name == "step-00000008"
    assert not list(tmp_path.glob("runs/*/*.png"))
    launched(pipeline, latents, tmp_path, **settings)
    assert len(list(tmp_path.glob("runs/*/*.png"))) == 2
    stopped, straight = (opening(one / "model", "model", "train") for one in (tmp_path, spread))
    assert stopped.files == straight.files


@pytest.mark.kills
def test_stopped_and_killed_it_ends_in_the_same_bytes(
    pipeline: Path, latents: Path, tmp_path: Path, spread: Path
) -> None:
    for steps, way, code in ((3, terminate, 143), (10, kill_all, -signal.SIGKILL)):
        process = launch(pipeline, latents, tmp_path, **SETTINGS, **SPREAD)
        wait_for(partial(has_done, tmp_path, steps), process)
        way(process)
        assert process.wait() == code
    assert not (tmp_path / "model").exists()
    launched(pipeline, latents, tmp_path, **SPREAD)
    killed, straight = (opening(one / "model", "model", "train") for one in (tmp_path, spread))
    assert killed.files == straight.files


@pytest.mark.kills
@pytest.mark.parametrize(
    ("first", "then"), [("spread", "cpu"), ("spread", "cpu-ddp"), ("alone", "cpu-fsdp")]
)
def test_a_checkpoint_goes_on_under_another_number_of_processes(
    request: pytest.FixtureRequest,
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    first: str,
    then: str,
) -> None:
    straight = request.getfixturevalue(first)
    shutil.copytree(straight / "runs", tmp_path / "runs")
    shutil.rmtree(last(tmp_path))
    launched(pipeline, latents, tmp_path, accelerate=f"infra/accelerate/{then}.yaml")
    assert_alike(tmp_path, straight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "prodigy", "learning_rate": 1.0}, "optimizer prodigy: .*set it to adamw"),
        ({"optimizer": "adamw8bit"}, "optimizer adamw8bit: .*set it to adamw"),
        ({"lora": {}}, "lora: .*set it to null"),
        ({"mixed_precision": "fp16"}, "mixed_precision fp16: .*set it to bf16 or no"),
        ({"compile": True}, "compile: .*set it to false, or leave the weights whole"),
    ],
)
def test_what_cannot_be_spread_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"train\.{words}") as caught:
        fsdp.check(Train.model_validate(settings))
    assert "\n" not in str(caught.value)
    fsdp.check(Train())


@pytest.mark.parametrize("key", ["fsdp_offload_params", "fsdp_activation_checkpointing"])
def test_a_configuration_that_asks_for_more_is_refused(
    monkeypatch: pytest.MonkeyPatch, pipeline: Path, latents: Path, tmp_path: Path, key: str
) -> None:
    # As accelerate's launcher puts it.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(key.upper(), "true")
    with pytest.raises(UserError, match=rf"{key}: cannot be had .*\(FSDP\); set it to false"):
        run_here(pipeline, latents, tmp_path)
    assert not os.environ.get("ACCELERATE_USE_FSDP")
