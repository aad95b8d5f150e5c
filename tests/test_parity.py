"""Training from the cache is training on the pictures: the same loss, the same pictures back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from ldm.cache import LatentCache
from ldm.config import Encode, Pretrained
from ldm.denoiser import Denoiser
from ldm.encode.stage import encode
from ldm.images import psnr, to_model, to_pixels
from ldm.latents import IDS, STATES
from ldm.models import load_text_encoder, load_vae, locate
from ldm.noise_schedule import load_schedule
from ldm.pipeline import load_unet
from ldm.scenes.lists import caption_of
from ldm.text import tokenize
from ldm.train.data import Batch, TrainingBatches
from ldm.train.draws import ORDER, TRAIN, counter_based
from ldm.train.objective import Objective
from tests.conftest import scenes

SEED, BATCH, DROPOUT, GAMMA = 3, 16, 0.3, 5.0
TINY = locate("tiny")
"""Trained: what it draws depends on texts, and its autoencoder gives pictures back."""


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    encode(Encode(batch_size=16), Pretrained(), images, folder / "latents", folder / "runs")
    return folder / "latents"


def step_of(latents: Path, step: int, texts: str = STATES) -> Batch:
    cache, settings = LatentCache(latents, "train", texts), {"seed": SEED, "timesteps": 1000}
    return TrainingBatches(cache, batch_size=BATCH, caption_dropout=DROPOUT, **settings)[step]


def from_the_cache(latents: Path, texts: str, step: int) -> float:
    """The loss of a step as the trainer computes it."""
    objective = Objective.of(load_schedule(TINY), GAMMA)
    denoiser = Denoiser(load_unet(TINY), load_text_encoder(TINY)[1] if texts == IDS else None)
    return float(objective.loss(denoiser, step_of(latents, step, texts)).mean())


def online(latents: Path, step: int) -> float:
    """The same by diffusers' parts, from pictures and captions, with the same random draws."""
    pictures, captions, spread = drawn(len(LatentCache(latents, "train")), step)
    vae, (tokenizer, text_encoder) = load_vae(TINY), load_text_encoder(TINY)
    posterior = vae.encode(to_model(pictures)).latent_dist
    clean = (posterior.mean + posterior.std * spread) * vae.config.scaling_factor
    states = text_encoder(tokenize(tokenizer, captions)).last_hidden_state
    unet = UNet2DConditionModel.from_pretrained(TINY.location, subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(TINY.location, subfolder="scheduler")
    noise, timesteps = step_of(latents, step).noise, step_of(latents, step).timesteps
    noisy = scheduler.add_noise(clean, noise, timesteps)
    error = unet(noisy, timesteps, states).sample - scheduler.get_velocity(clean, noise, timesteps)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = snr.clamp(max=GAMMA) / (snr + 1)  # Min-SNR (arXiv:2303.09556) for v-prediction.
    return float((error.square().mean(dim=(1, 2, 3)) * weight[timesteps]).mean())


def drawn(count: int, step: int) -> tuple[np.ndarray, list[str], torch.Tensor]:
    """A step's pictures, captions, and the normal numbers of its posterior samples."""
    rows, captions, spreads = [], [], []
    for position in range(step * BATCH, (step + 1) * BATCH):
        epoch, place = divmod(position, count)
        rows.append(int(counter_based(SEED, ORDER, epoch).permutation(count)[place]))
        rng = counter_based(SEED, TRAIN, position)
        spread, _noise = rng.standard_normal((2, 4, 8, 8), dtype=np.float32)
        spreads.append(spread)
        dropped = rng.random() < DROPOUT
        captions.append("" if dropped else caption_of("retrain", "train", rows[-1]))
    return scenes("train", count)[rows], captions, torch.from_numpy(np.stack(spreads))


@torch.no_grad()
@pytest.mark.parametrize("texts", [STATES, IDS])
@pytest.mark.parametrize("step", [0, 7])
def test_a_steps_loss_is_that_of_encoding_online(cached: Path, texts: str, step: int) -> None:
    assert from_the_cache(cached, texts, step) == pytest.approx(online(cached, step), rel=1e-4)


@torch.no_grad()
def test_the_cache_gives_pictures_back_as_well_as_the_vae_can(cached: Path) -> None:
    vae, cache = load_vae(TINY), LatentCache(cached, "validation")
    pictures, samples = scenes("validation", len(cache)), range(len(cache))
    zeros = np.zeros((len(cache), *cache.latent_shape(0)), np.float32)
    latents = cache.latents(samples, zeros)
    decoded = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
    own = psnr(to_pixels(vae(to_model(pictures), sample_posterior=False).sample), pictures)
    assert own.mean() > 25
    np.testing.assert_allclose(psnr(to_pixels(decoded), pictures), own, atol=0.05)
