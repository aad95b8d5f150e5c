"""Each option of a training does what it says, and would be missed here if it did nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file

from ldm.artifacts import opening
from ldm.cache import LatentCache
from ldm.config import EvaluationSampling, NoiseSchedule, Pretrained, Train
from ldm.device import plain_attention
from ldm.errors import UserError
from ldm.grid import captioned_grid
from ldm.images import decode_image
from ldm.models import Source
from ldm.nn.layers import ResidualBlock
from ldm.noise_schedule import fresh_schedule, load_schedule
from ldm.params import load_params
from ldm.pipeline import load_unet
from ldm.sampling import Painter, Request
from ldm.train.compilation import compile_steps
from ldm.train.data import TrainingBatches
from ldm.train.objective import Objective
from ldm.train.sample_sheet import COLUMNS, sheet_name
from ldm.train.stage import train
from tests.launched import SHORT, launch
from tests.test_train import read_log, run_here, weights

SMALL = {"widths": [16, 32], "head_width": 8, "norm_groups": 4}
RANDOM = {"init": "random", "unet": SMALL}


def differ(some: Path, other: Path) -> bool:
    return any(not tensor.equal(weights(other)[name]) for name, tensor in weights(some).items())


# Noise


def test_zero_terminal_snr_reaches_training_and_folder(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    noise = {"beta_schedule": "scaled_linear"}
    schedules = {}
    for zero in (False, True):
        settings = {**RANDOM, "steps": 1, "noise": {**noise, "zero_terminal_snr": zero}}
        model = run_here(pipeline, latents, tmp_path / str(zero), **settings)
        schedules[zero] = load_schedule(Source(str(model)))
    assert float(Objective.of(schedules[True], None).levels.signal[-1]) == 0
    assert float(Objective.of(schedules[False], None).levels.signal[-1]) > 0.05
    assert differ(tmp_path / "False" / "model", tmp_path / "True" / "model")


def test_a_start_is_taught_another_forward_process(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    """Adam's first step is as long as its rate: the weights are still the start's."""
    noise = {"beta_schedule": "scaled_linear", "zero_terminal_snr": True}
    settings = {"steps": 1, "warmup_steps": 1, "learning_rate": 1e-6, "ema_decay": 0.0}
    model = run_here(pipeline, latents, tmp_path / "other", **settings, noise=noise)
    wanted = fresh_schedule(NoiseSchedule.model_validate(noise))
    assert load_schedule(Source(str(model))).items() >= wanted.items()
    start = weights(pipeline)
    assert all((one - start[name]).abs().max() < 2e-6 for name, one in weights(model).items())
    own = run_here(pipeline, latents, tmp_path / "own", **settings)
    assert load_schedule(Source(str(own))) == load_schedule(Source(str(pipeline)))
    assert read_log(own)[-1]["val_loss"] != read_log(model)[-1]["val_loss"]


def test_a_network_that_takes_more_than_latents_is_no_start(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    """As those for inpainting do."""
    other = tmp_path / "inpainting"
    shutil.copytree(pipeline, other)
    unet = load_unet(Source(str(other)), "diffusers")
    assert isinstance(unet, UNet2DConditionModel)
    UNet2DConditionModel.from_config(unet.config, in_channels=9).save_pretrained(other / "unet")
    with pytest.raises(UserError, match=r"inpainting: its UNet has in_channels 9, .* ask for 4;"):
        run_here(pipeline, latents, tmp_path, init=str(other))


def test_the_schedule_of_a_model_clips_no_latents(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    """As diffusers' DDPM and DDIM do by default, which is for pixels in [-1, 1]."""
    model = run_here(pipeline, latents, tmp_path, steps=1)
    written = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    assert written["clip_sample"] is False


def test_a_start_that_predicts_epsilon_of_noise_alone_is_refused() -> None:
    schedule = fresh_schedule(NoiseSchedule(prediction="epsilon"))
    Objective.of(schedule, 5.0)
    with pytest.raises(UserError, match=r"train\.init: .*predicts epsilon .*rescale_betas_zero"):
        Objective.of({**schedule, "rescale_betas_zero_snr": True}, 5.0)


def test_offset_noise_moves_whole_channels_and_nothing_else(latents: Path) -> None:
    cache = LatentCache(latents, "train")
    settings: dict[str, Any] = {"seed": 1, "timesteps": 1000, "caption_dropout": 0.3}
    plain, moved = (
        TrainingBatches(cache, batch_size=256, offset_noise=strength, **settings)[0]
        for strength in (0.0, 0.5)
    )
    for same in ("latents", "texts", "timesteps"):
        assert torch.equal(getattr(plain, same), getattr(moved, same))
    offset = moved.noise - plain.noise
    assert float(offset.std(dim=(2, 3)).max()) < 1e-6
    by_channel = offset.mean(dim=(2, 3)).flatten()
    # Four standard errors of 1,024 draws.
    assert float(by_channel.mean()) == pytest.approx(0, abs=4 * 0.5 / 32)
    assert float(by_channel.std()) == pytest.approx(0.5, rel=4 / (2 * 1024) ** 0.5)


def test_offset_noise_reaches_the_training(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    plain = run_here(pipeline, latents, tmp_path / "plain", steps=2)
    assert differ(plain, run_here(pipeline, latents, tmp_path / "moved", steps=2, offset_noise=0.1))


# Precision and memory


def test_half_precision_is_refused_without_a_gpu(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.mixed_precision fp16: is for GPUs"):
        run_here(pipeline, latents, tmp_path, mixed_precision="fp16")


@pytest.fixture
def any_algorithms() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("any_algorithms")
@pytest.mark.parametrize("asked", [True, False])
def test_deterministic_training_allows_no_other_kernels(
    pipeline: Path, latents: Path, tmp_path: Path, asked: bool
) -> None:
    run_here(pipeline, latents, tmp_path, steps=1, deterministic=asked)
    assert torch.are_deterministic_algorithms_enabled() is asked
    assert (os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8") is asked


@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("network", "block"), [("ldm", ResidualBlock), ("diffusers", ResnetBlock2D)]
)
def test_gradient_checkpointing_computes_twice_and_changes_nothing(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    network: str,
    block: type[torch.nn.Module],
    precision: str,
) -> None:
    calls: Counter[bool] = Counter()
    forward, asked = block.forward, False

    def counted(*arguments: Any) -> torch.Tensor:
        calls[asked] += torch.is_grad_enabled()
        return forward(*arguments)

    monkeypatch.setattr(block, "forward", counted)
    for asked in (False, True):
        settings = {"gradient_checkpointing": asked, "mixed_precision": precision, "steps": 4}
        run_here(pipeline, latents, tmp_path / str(asked), network, **settings)
    assert not differ(tmp_path / "False" / "model", tmp_path / "True" / "model")
    # Those of the mid block's second half are not: diffusers leaves them out too.
    assert calls[True] > 1.7 * calls[False]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # C++ is compiled for most of it.
def test_a_compiled_training_is_the_same_but_for_rounding(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    smallest = {"init": "random", "unet": {"widths": [8], "head_width": 8, "norm_groups": 4}}
    logs, checkpoints = [], []
    for compiled in (False, True):
        settings = {**smallest, "compile": compiled, "steps": 4, "log_every": 1}
        settings |= {"validate_every": 2, "sample_every": 2, "sample_prompts": ["a red circle"]}
        model = run_here(pipeline, latents, tmp_path / str(compiled), **settings)
        steps = [line for line in read_log(model) if "loss" in line]
        logs.append([(line["loss"], line["gradient_norm"]) for line in steps])
        (checkpoint,) = tmp_path.glob(f"{compiled}/runs/*/step-00000004")
        checkpoints.append(checkpoint)
        # One, of a training step: validation and sheets are not compiled.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    np.testing.assert_allclose(*logs, rtol=1e-3)
    for part in ("weights", "ema", "optimizer"):
        eager, fast = (load_file(one / f"{part}.safetensors") for one in checkpoints)
        assert eager.keys() == fast.keys()


@pytest.mark.parametrize(
    ("device", "network", "asked"),
    [("cuda", "diffusers", True), ("cuda", "ldm", False), ("cpu", "diffusers", False)],
)
def test_the_compiler_orders_a_network_that_has_no_order_of_its_own(
    device: str, network: str, asked: bool, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler itself takes the option, and refuses those that it does not know."""
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _, **options: given.append(options))
    unet = load_unet(Source(str(pipeline)), network)
    compile_steps(unet, torch.device(device), 1)
    taken = torch._TorchCompileInductorWrapper(None, given[0]["options"], given[0]["dynamic"])
    assert bool(taken.config.get("force_layout_optimization")) is asked


def test_compiling_without_a_compiler_is_one_line(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"train\.compile: there is no no-such-compiler"):
        run_here(pipeline, latents, tmp_path, compile=True)


# Where it starts


def test_it_starts_from_a_folder(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    other = run_here(pipeline, latents, tmp_path / "other", learning_rate=1e-2)
    settings = {"init": str(other), "learning_rate": 1e-12, "steps": 1}
    model = run_here(pipeline, latents, tmp_path / "next", **settings)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(weights(model)[name], tensor, rtol=0, atol=1e-9)
    assert differ(model, pipeline)
    assert opening(model, "model", "train").config["init"] == str(other)


@pytest.mark.slow
def test_it_starts_from_a_revision_of_a_hub_id(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache of a hub that has a newer one too."""
    older, newer = (run_here(pipeline, latents, tmp_path / str(n), steps=n) for n in (2, 4))
    cached = tmp_path / "hub" / "models--ldm--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("b" * 40)
    for revision, model in (("a" * 40, older), ("b" * 40, newer)):
        shutil.copytree(model, cached / "snapshots" / revision)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = {"init": f"ldm/model@{'a' * 40}", "learning_rate": 1e-12, "steps": 1}
    assert launch(pipeline, latents, tmp_path / "next", **settings).wait() == 0
    for name, tensor in weights(older).items():
        torch.testing.assert_close(
            weights(tmp_path / "next" / "model")[name], tensor, rtol=0, atol=1e-9
        )
    assert differ(older, newer)


# What it draws meanwhile


def test_a_sheet_is_drawn_by_the_averaged_weights_each_picture_under_a_seed_of_its_own(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    """The same ones on every sheet; and a checkpoint draws by its averaged weights."""
    prompts = ["a red star", "a red star", "two blue stars"]
    settings = {"sample_every": 6, "sample_prompts": prompts, "checkpoint_every": 6}
    settings |= {"learning_rate": 1e-2, "mixed_precision": "no"}
    config = Train.model_validate({**SHORT, **settings})
    how = EvaluationSampling(steps=4, guidance=5)
    paths = (latents, tmp_path / "model", tmp_path / "runs")
    train(config, Pretrained(pipeline=str(pipeline)), *paths, sampling=how)
    (run,) = (tmp_path / "runs").iterdir()
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    for step in (6, 12):
        painter = Painter.load(Source(str(run / f"step-{step:08d}")))
        with plain_attention(painter.device):
            pictures = list(painter.draw(requests, how))
        sheet = decode_image((run / sheet_name(step)).read_bytes())
        assert np.array_equal(sheet, captioned_grid(pictures, prompts, COLUMNS))


# What cannot go together

REFUSED: list[tuple[list[str], str]] = [
    (
        ["init=random", "noise.prediction=epsilon", "noise.zero_terminal_snr=true"],
        r"train\.noise: zero_terminal_snr: epsilon .*; set prediction to v_prediction",
    ),
    (
        ["init=random", "noise.prediction=flow_prediction", "noise.zero_terminal_snr=true"],
        r"train\.noise: zero_terminal_snr: a flow .*; leave it out",
    ),
    (
        ["init=random", "noise.prediction=flow_prediction", "noise.beta_schedule=linear"],
        r"train\.noise: beta_schedule: flow_prediction has no betas; leave it out",
    ),
    (["lora.rank=4", "noise.prediction=epsilon"], r"train: lora: .*; set noise to null, or lora"),
    (["unet.widths=[32]"], r"train: unet: is for init random; .*set init to random"),
    (["optimizer=prodigy"], r"train: learning_rate 0\.0004: prodigy .*set learning_rate to 1"),
    (
        ["optimizer=prodigy", "learning_rate=1", "text_learning_rate=0.1"],
        r"train: text_learning_rate 0\.1: prodigy has one rate .*set it to learning_rate, 1\.0",
    ),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_what_cannot_go_together_is_refused_with_a_remedy(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_params("tiny", [f"train.{one}" for one in overrides])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["init=random", "noise.prediction=flow_prediction"],
        ["init=random", "noise.zero_terminal_snr=true", "noise.beta_schedule=linear"],
        ["optimizer=prodigy", "learning_rate=1", "text_learning_rate=1", "schedule=constant"],
    ],
)
def test_what_can_go_together_is_taken(overrides: list[str]) -> None:
    params = load_params("tiny", [f"train.{one}" for one in overrides])
    # As the launcher hands it to the trainer.
    assert Train.model_validate(params.train.as_dict()) == params.train
