"""Training at the size of Stable Diffusion 1, random weights: needs a GPU of some 70 GB.

For 512 and 256 pixels: the ladder from a plain step to the fastest one (:mod:`bench.sd_ladder`), in
pictures a second and model FLOPs utilisation; then the trainer's step over the bare one, and over
one that encodes pictures and captions itself. ``--small`` runs a toy of it on any machine, to see
that it works; its figures say nothing. ``python -m bench.sd 512``: that size alone; with
``--compare``: without the ladder.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path

import torch

from bench import SMALL
from bench.compare import compare
from bench.loops import bare, encoding
from bench.sd_encoders import TOKENS, WIDTH, sd_encoders
from bench.sd_ladder import ladder
from bench.sd_model import (
    DEVICE,
    SIZES,
    Size,
    in_bfloat16,
    random_batch,
    stable_diffusion,
    synchronize,
)
from bench.synthetic import write_latents
from ldm.cache import LatentCache
from ldm.config import NoiseSchedule, Train
from ldm.denoiser import Denoiser
from ldm.device import plain_attention
from ldm.noise_schedule import fresh_schedule
from ldm.run_log import LOG, RunLog, entries
from ldm.termination import Termination
from ldm.train.compilation import compile_steps
from ldm.train.data import Batch
from ldm.train.objective import Objective
from ldm.train.settings import accelerator_for, settled_training
from ldm.train.skipped import SkippedSteps
from ldm.train.trainer import Trainer
from ldm.unet import Network

ROUNDS = 5


@plain_attention(DEVICE)
def main() -> None:
    """Print the ladder and the two comparisons for each size."""
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"Stable Diffusion 1, random weights, on {card}, torch {torch.__version__}")
    for size in [one for one in SIZES if str(one.pixels) in sys.argv] or SIZES:
        if "--compare" not in sys.argv:
            ladder(size)
        with tempfile.TemporaryDirectory() as folder:
            comparisons(size, Path(folder))


def comparisons(size: Size, folder: Path) -> None:
    """Print our trainer over the bare loop and over the one that encodes at every step.

    All on one network, compiled once for both.
    """
    torch.compiler.reset()
    unet = stable_diffusion()
    compile_steps(unet, DEVICE, 1)
    # More than the loader makes ahead.
    steps = 1 if SMALL else 24
    pictures, title = steps * size.full, f"{size.pixels} pixels, batch {size.full}, compiled"

    def loop(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(steps):
                step()
            synchronize()

        return run

    fixed = random_batch(size, size.full)
    plain = loop(bare(unet, lambda: fixed, in_bfloat16))
    with training(unet, size, folder) as step:
        ours = loop(step)
        compare(f"{title}: pictures/s", ("bare loop", plain), ("ldm train", ours), pictures, ROUNDS)
        if any("skipped" in entry for entry in entries(folder / LOG)):
            sys.exit("bench: a step was skipped, which costs less than one that is taken")
        online = loop(bare(unet, encoding_at(size), in_bfloat16))
        compare(f"{title}: pictures/s", ("encoding", online), ("ldm train", ours), pictures, 3)


@contextmanager
def training(unet: Network, size: Size, folder: Path) -> Iterator[Callable[[], object]]:
    """The trainer's step on cached latents."""
    side = size.pixels // 8
    write_latents(folder / "latents", 2 * size.full, (8, side, side), (TOKENS, WIDTH), "float16")
    cache = LatentCache(folder / "latents", "train")
    workers = 0 if SMALL else 4
    config = settled_training(Train(batch_size=size.full, steps=10**6, workers=workers), DEVICE)
    objective = Objective.of(fresh_schedule(NoiseSchedule()), config.min_snr_gamma)
    accelerator = accelerator_for(config, DEVICE)
    trainer = Trainer(accelerator, config, objective, cache, cache, Denoiser(unet), folder)
    micro_batches, numbers = trainer.micro_batches(0), count()
    log = RunLog(folder / LOG, 0, writes=True)
    skipped = SkippedSteps(accelerator, log, 0, config.max_skipped)
    yield lambda: trainer.step(next(numbers), micro_batches, Termination(), skipped)


def encoding_at(size: Size) -> Callable[[], Batch]:
    """Batches by a VAE and a CLIP of Stable Diffusion's size, in bfloat16."""
    with DEVICE:
        vae, clip = (one.to(torch.bfloat16) for one in sd_encoders(small=SMALL))
    pictures = torch.randn(size.full, 3, size.pixels, size.pixels, device=DEVICE)
    ids = torch.randint(0, 49406, (size.full, TOKENS), device=DEVICE)
    return encoding(vae, clip, pictures, ids, nullcontext)


if __name__ == "__main__":
    main()
