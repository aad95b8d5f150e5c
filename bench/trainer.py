"""The trainer at ``tiny``: its step over the bare one and over one that encodes, and what a
checkpoint costs. The stage as it is started: :mod:`bench.launched`.

Needs ``artifacts/latents`` (``make demo`` makes it). All loops train the same UNet from the same
weights in the same precision; the bare one sees one fixed batch and does nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench.compare import compare
from bench.loops import bare, encoding
from ldm.cache import LatentCache
from ldm.config import Pretrained, Train
from ldm.denoiser import Denoiser
from ldm.device import autocast, device_of, plain_attention
from ldm.memory import keep_memory
from ldm.models import load_encoders, locate
from ldm.noise_schedule import load_schedule
from ldm.pipeline import load_unet
from ldm.run_log import LOG, RunLog
from ldm.saver import Saver
from ldm.termination import Termination
from ldm.train.data import Batch
from ldm.train.objective import Objective
from ldm.train.settings import accelerator_for, settled_training
from ldm.train.skipped import SkippedSteps
from ldm.train.trainer import Trainer

LATENTS = Path("artifacts/latents")
BATCH, ROUNDS, STEPS, SIDE = 64, 7, 20, 64
DEVICE = device_of()
SOURCE = locate(Pretrained().pipeline)


@plain_attention(DEVICE)
def main() -> None:
    """Print samples a second of the loops and their ratios."""
    keep_memory(DEVICE)  # As ``train`` does; the others have it too.
    title = f"training, tiny, batch {BATCH}, precision auto: samples a second"
    with tempfile.TemporaryDirectory() as run:
        trainer = trainer_in(Path(run))
        ours = ("ldm train", steps_of(trainer, Path(run)))
        fixed = trainer.batches[0].to(DEVICE)
        compare(title, ("bare loop", repeated(lambda: fixed)), ours, STEPS * BATCH, ROUNDS)
        compare(title, ("encoding", repeated(encoding_tiny())), ours, STEPS * BATCH, 3)
        saving = ("with a checkpoint", saved(trainer, ours[1], Path(run)))
        compare(title, ("ldm train", ours[1]), saving, STEPS * BATCH, ROUNDS)
        print(
            f"a checkpoint in {STEPS} steps; by default there is one in {Train().checkpoint_every}"
        )


def trainer_in(run: Path) -> Trainer:
    """The trainer of ``ldm train`` with its default settings, but for the last step."""
    config = settled_training(Train(batch_size=BATCH, steps=10**6), DEVICE)
    schedule = load_schedule(SOURCE)
    objective = Objective.of(schedule, config.min_snr_gamma, config.snr_floor)
    cache, held_out = (LatentCache(LATENTS, split) for split in ("train", "validation"))
    denoiser = Denoiser(load_unet(SOURCE))
    accelerator = accelerator_for(config, DEVICE)
    return Trainer(accelerator, config, objective, cache, held_out, denoiser, run)


def steps_of(trainer: Trainer, run: Path) -> Callable[[], None]:
    """A function that takes the trainer's next ``STEPS`` steps."""
    micro_batches, numbers = trainer.micro_batches(0), count()
    log = RunLog(run / LOG, 0, writes=True)
    skipped = SkippedSteps(trainer.accelerator, log, 0, trainer.config.max_skipped)

    def ours() -> None:
        for _ in range(STEPS):
            trainer.step(next(numbers), micro_batches, Termination(), skipped)

    return ours


def repeated(batches: Callable[[], Batch]) -> Callable[[], None]:
    """The bare step on a UNet of its own, ``STEPS`` times."""
    step = bare(load_unet(SOURCE).to(DEVICE).train(), batches, in_precision)

    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


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


def saved(trainer: Trainer, steps: Callable[[], None], run: Path) -> Callable[[], None]:
    """The same steps, a checkpoint written beside them."""
    numbers: Iterator[int] = count(1)

    def with_checkpoint() -> None:
        with Saver(run, keep=2) as saver:
            saver.save(trainer.state.checkpoint(next(numbers), None))
            steps()

    return with_checkpoint


if __name__ == "__main__":
    main()
