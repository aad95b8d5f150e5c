"""Flow matching from a training to a picture, with our samplers and with diffusers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

from ldm.artifacts import writing
from ldm.config import Encode, NoiseSchedule, Pretrained, Sampling
from ldm.diffusion import FLOW
from ldm.encode.stage import encode
from ldm.errors import UserError
from ldm.explain import forward, reverse
from ldm.images import encode_png, psnr
from ldm.models import Source
from ldm.noise_schedule import fresh_schedule, load_schedule
from ldm.sampling import Painter, Request
from ldm.scenes.lists import caption_of, scene_of
from ldm.scenes.render import draw
from ldm.schedulers import make_sampler
from ldm.train.data import Batch
from ldm.train.objective import Objective
from tests.shards import write_shards
from tests.test_train import read_log, run_here

RANDOM = {"init": "random", "unet": {"widths": [16, 32], "head_width": 8, "norm_groups": 4}}
SCENE, CAPTION = draw(scene_of("retrain", "train", 0)[1]), caption_of("retrain", "train", 0)


@pytest.fixture(scope="module")
def one_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of a single scene under ``tiny``, whose autoencoder gives pictures back."""
    folder = tmp_path_factory.mktemp("scene")
    counts = {"train": 1, "validation": 1}
    settings = {"image_format": "png"}
    with writing(folder / "images", "images", config=settings, inputs={}, counts=counts) as fresh:
        for split in counts:
            sample = {"png": encode_png(SCENE), "json": json.dumps({"caption": CAPTION}).encode()}
            write_shards(fresh, split, [("00000000", sample)], a_shard=1)
    encode(Encode(), Pretrained(), folder / "images", folder / "latents", folder / "runs")
    return folder / "latents"


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory, one_scene: Path) -> Path:
    """A flow from random weights that has seen nothing but the scene."""
    settings = {"steps": 100, "learning_rate": 4e-3, "ema_decay": 0.98, "caption_dropout": 0.0}
    noise = {"prediction": FLOW}
    folder = tmp_path_factory.mktemp("flow")
    return run_here(Path("tiny"), one_scene, folder, **RANDOM, **settings, noise=noise)


@pytest.mark.parametrize("sampler", ["euler", "dpm++", "dpm++sde"])
def test_a_flow_learns_a_picture_and_draws_it(flow: Path, sampler: str) -> None:
    losses = [line["loss"] for line in read_log(flow) if "loss" in line]
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    sampling = Sampling(sampler=sampler, guidance=1.0)  # type: ignore[arg-type]
    requests = [Request(CAPTION, seed) for seed in range(3)]
    drawn = np.stack(list(Painter.load(Source(str(flow))).draw(requests, sampling)))
    grey = np.full_like(SCENE, int(SCENE.mean()))
    assert psnr(drawn, np.stack([SCENE] * 3)).min() > psnr(grey[None], SCENE[None])[0] + 6


def test_training_tells_the_network_what_samplers_tell_it() -> None:
    schedule, told = fresh_schedule(NoiseSchedule(prediction="flow_prediction")), []

    class Network(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, _: object) -> torch.Tensor:
            told.append(timesteps)
            return noisy

    zeros = torch.zeros(2, 1, 1, 1)
    batch = Batch(zeros, zeros, zeros, torch.tensor([999, 499]))
    Objective.of(schedule, None).loss(Network(), batch)
    first, half = (make_sampler("euler", schedule, steps).timesteps for steps in (1, 1000))
    assert told[0].tolist() == pytest.approx([first[0], half[500]])


def test_diffusers_opens_a_flow_and_draws_the_same(flow: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(flow, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "np"}
    theirs = pipeline(CAPTION, latents=noise, **options).images
    (ours,) = Painter.load(Source(str(flow))).draw([Request(CAPTION, 1)], Sampling(steps=8))
    assert psnr(ours[None], np.rint(theirs * 255).astype(np.uint8)).min() > 40


def test_a_flow_is_explained_like_any_model(flow: Path) -> None:
    painter = Painter.load(Source(str(flow)))
    there, back = forward(painter, SCENE, seed=1), reverse(painter, CAPTION, seed=1)
    grey = psnr(np.full_like(SCENE, int(SCENE.mean()))[None], SCENE[None])[0]
    for frames in (there[::-1], back):
        errors = psnr(np.stack(frames), np.stack([SCENE] * len(frames)))
        assert errors[0] < grey < errors[-1] - 6


@pytest.mark.parametrize("sampler", ["euler", "dpm++"])
def test_network_and_samplers_of_diffusers_draw_a_flow_too(flow: Path, sampler: str) -> None:
    pictures = []
    for whose in ("ldm", "diffusers"):
        values = {"sampler": sampler, "steps": 8, "implementation": whose}
        painter = Painter.load(Source(str(flow)), network=whose)
        pictures.append(*painter.draw([Request(CAPTION, 1)], Sampling.model_validate(values)))
    assert psnr(pictures[0][None], pictures[1][None]).min() > 45


def test_a_flow_is_gone_on_with_as_a_flow(flow: Path, one_scene: Path, tmp_path: Path) -> None:
    before = read_log(flow)[-1]["val_loss"]
    settings = {"init": str(flow), "steps": 2, "learning_rate": 1e-12}
    model = run_here(Path("tiny"), one_scene, tmp_path, **settings)
    written = load_schedule(Source(str(model)))
    assert written == load_schedule(Source(str(flow)))
    assert written == fresh_schedule(NoiseSchedule(prediction="flow_prediction"))
    assert read_log(model)[-1]["val_loss"] == pytest.approx(before, rel=1e-3)


@pytest.fixture
def flow_of_diffusers(flow: Path, tmp_path: Path) -> Path:
    """The same weights with the scheduler of Stable Diffusion 3."""
    shutil.copytree(flow, tmp_path / "flow")
    shutil.rmtree(tmp_path / "flow" / "scheduler")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.save_pretrained(tmp_path / "flow" / "scheduler")
    return tmp_path / "flow"


def test_a_folder_with_diffusers_scheduler_is_known_as_a_flow(flow_of_diffusers: Path) -> None:
    schedule = load_schedule(Source(str(flow_of_diffusers)))
    assert schedule == {"num_train_timesteps": 1000, "prediction_type": FLOW, "flow_shift": 2.0}


def test_a_flow_of_another_kind_is_refused(flow_of_diffusers: Path) -> None:
    path = flow_of_diffusers / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": True}))
    with pytest.raises(UserError, match="flow: scheduler: use_dynamic_shifting is set"):
        Painter.load(Source(str(flow_of_diffusers)))
