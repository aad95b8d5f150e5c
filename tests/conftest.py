"""Shared pieces: a pipeline of a few thousand random weights, and artifacts made with it."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from hypothesis import settings
from transformers import CLIPModel, CLIPTextModel

from ldm.artifacts import writing
from ldm.config import ClipTraining, Encode, Pretrained, UnetShape, VaeTraining
from ldm.device import CPU_ASKED
from ldm.encode.stage import encode
from ldm.first_stage.clip import build_clip
from ldm.first_stage.tokenizer import train_tokenizer
from ldm.first_stage.vae import build_vae
from ldm.images import encode_png
from ldm.models import Source, load_encoders
from ldm.pipeline import save_pipeline
from ldm.scenes.lists import caption_of, scene_of
from ldm.scenes.render import draw
from ldm.tracking.connection import TRACKING_URI
from ldm.unet import random_unet
from tests.shards import write_shards

# A slow machine breaks no property, and a run tries what the run before it did.
settings.register_profile("ldm", deadline=None, derandomize=True)
settings.load_profile("ldm")

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and results stay the same anywhere.

    In the processes that tests start too: on a busy machine two threads wait for each other.
    """
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    """What a command that ran here has frozen is looked through for garbage again."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _tracks_where_it_did() -> Iterator[None]:
    """A command that ran here has set where MLflow is, for what it starts; not for other tests."""
    before = os.environ.get(TRACKING_URI)
    yield
    if before is None:
        os.environ.pop(TRACKING_URI, None)
    else:
        os.environ[TRACKING_URI] = before


@pytest.fixture(autouse=True, scope="session")
def _on_the_cpu() -> Iterator[None]:
    """Here and in the processes that tests start, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CPU_ASKED, "true")
        yield


@pytest.fixture
def any_precision() -> Iterator[None]:
    """accelerate keeps one precision a process, in tests that of most of them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete pipeline folder in Stable Diffusion layout, with ``clip``, of random weights."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    vae: AutoencoderKL = build_vae(VaeTraining(widths=(8, 8, 8, 8), norm_groups=4), 64)
    vae.save_pretrained(folder / "vae")
    config = ClipTraining(width=16, layers=1, heads=2, patch_size=16, max_tokens=40)
    captions = [caption_of("retrain", "train", row) for row in range(200)]
    tokenizer = train_tokenizer(config, captions)
    clip: CLIPModel = build_clip(config, tokenizer, 64)
    clip.save_pretrained(folder / "clip")
    for part in ("clip", "tokenizer"):
        tokenizer.save_pretrained(folder / part)
    CLIPTextModel.from_pretrained(folder / "clip").save_pretrained(folder / "text_encoder")
    shape = UnetShape(widths=(16, 16), head_width=8, norm_groups=4)
    unet = random_unet(shape, latent_channels=4, latent_size=8, text_width=16, seed=0)
    save_pipeline(folder, load_encoders(Source(str(folder))), unet, SCHEDULE)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An images artifact of 48 training and 16 validation scenes, without a download."""
    folder = tmp_path_factory.mktemp("artifacts") / "images"
    counts = {"train": 48, "validation": 16}
    settings = {"image_format": "png"}
    with writing(folder, "images", config=settings, inputs={}, counts=counts) as fresh:
        for split, count in counts.items():
            write_shards(fresh, split, scene_samples(split, count), a_shard=20)
    return folder


def scene_samples(split: str, count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for row in range(count):
        about = json.dumps({"caption": caption_of("retrain", split, row)}).encode()
        picture = encode_png(draw(scene_of("retrain", split, row)[1]))
        yield f"{row:08d}", {"png": picture, "json": about}


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory, images: Path, pipeline: Path) -> Path:
    """The latents artifact of ``images`` under ``pipeline``."""
    folder = tmp_path_factory.mktemp("artifacts")
    out, runs = folder / "latents", folder / "runs"
    encode(Encode(batch_size=16), Pretrained(pipeline=str(pipeline)), images, out, runs)
    return out


def scenes(split: str, count: int) -> np.ndarray:
    """The first ``count`` scenes of a split: uint8 (count, 64, 64, 3)."""
    return np.stack([draw(scene_of("retrain", split, row)[1]) for row in range(count)])


class Pixels:
    """Pictures by their numbers, as the first stage reads them."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        return self.pixels[numbers]
