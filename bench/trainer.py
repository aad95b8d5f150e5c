"""The training at ``tiny``: its loop over the bare one and over one that encodes, and what a
checkpoint costs. The stage as it is started: :mod:`bench.launched`.

Needs ``artifacts/latents`` (``make demo`` makes it). All loops train the same UNet from the same
weights in the same precision; the bare one sees one fixed batch and does nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.compare import table
from bench.legs import legs, over, steady
from bench.loops import bare, encoding, times
from ldm.cache import LatentCache
from ldm.config import Pretrained, Train
from ldm.denoiser import Denoiser
from ldm.device import autocast, device_of, plain_attention
from ldm.memory import keep_memory
from ldm.models import load_encoders, locate
from ldm.noise_schedule import load_schedule
from ldm.pipeline import load_unet
from ldm.tracking.live import Live
from ldm.train.data import Batch, TrainingBatches
from ldm.train.objective import Objective
from ldm.train.settings import accelerator_for, settled_training
from ldm.train.trainer import Trainer

LATENTS = Path("artifacts/latents")
BATCH, ROUNDS, STEPS, SIDE = 64, 7, 20, 64
TITLE = f"training, tiny, batch {BATCH}, precision auto: samples a second"
DEVICE = device_of()
SOURCE = locate(Pretrained().pipeline)


@plain_attention(DEVICE)
def main() -> None:
    """Print samples a second of the loops and their ratios."""
    keep_memory(DEVICE)  # As ``train`` does; the others have it too.
    samples = STEPS * BATCH
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch = first_batch()
        bare_loop, online = repeated(lambda: batch), repeated(encoding_tiny())
        over(TITLE, ("bare loop", bare_loop), partial(training, folder / "1"), samples, ROUNDS)
        over(TITLE, ("encoding", online), partial(training, folder / "2"), samples, 3)
        saving = partial(training, folder / "3", checkpoint_every=3 * STEPS)
        _, *seconds = legs(saving, lambda: None, 1 + 3 * ROUNDS)
    # Of three, the second follows a checkpoint, and what is left of its writing is in the third.
    threes = zip(seconds[::3], seconds[1::3], seconds[2::3], strict=True)
    speeds = ((samples / plain, samples / (own + after - plain)) for plain, own, after in threes)
    table(TITLE, ("ldm train", "with a checkpoint"), speeds)
    print(f"a checkpoint in {STEPS} steps; by default there is one in {Train().checkpoint_every}")


def training(folder: Path, live: Live, **settings: Any) -> Trainer:
    """The trainer of ``ldm train`` by default, but for its end, checkpoints and validation."""
    asked = Train(batch_size=BATCH, **(steady(STEPS) | settings))
    config = settled_training(asked, DEVICE)
    schedule = load_schedule(SOURCE)
    objective = Objective.of(schedule, config.min_snr_gamma, config.snr_floor)
    cache, held_out = (LatentCache(LATENTS, split) for split in ("train", "validation"))
    denoiser = Denoiser(load_unet(SOURCE))
    accelerator = accelerator_for(config, DEVICE)
    folder.mkdir()
    parts = accelerator, config, objective, cache, held_out, denoiser, folder
    return Trainer(*parts, live=live)


def first_batch() -> Batch:
    """Of a training, with the default settings."""
    cache = LatentCache(LATENTS, "train")
    batches = TrainingBatches(
        cache, seed=0, batch_size=BATCH, timesteps=1000, caption_dropout=Train().caption_dropout
    )
    return batches[0].to(DEVICE)


def repeated(batches: Callable[[], Batch]) -> Callable[[], None]:
    """The bare step on a UNet of its own, ``STEPS`` times."""
    return times(STEPS, bare(load_unet(SOURCE).to(DEVICE).train(), batches, in_precision))


def in_precision() -> AbstractContextManager[Any]:
    """What the trainer computes in by default."""
    return autocast(DEVICE, "auto")


def encoding_tiny() -> Callable[[], Batch]:
    """Batches by the encoders of ``tiny``."""
    encoders = load_encoders(SOURCE)
    vae, clip = encoders.vae.to(DEVICE), encoders.text_encoder.to(DEVICE)
    pictures = torch.rand(BATCH, 3, SIDE, SIDE, device=DEVICE) * 2 - 1
    ids = torch.randint(0, 700, (BATCH, encoders.tokenizer.model_max_length), device=DEVICE)
    return encoding(vae, clip, pictures, ids, in_precision)


if __name__ == "__main__":
    main()
