"""Training at the size of Stable Diffusion 1, random weights: needs a GPU of some 70 GB.

For 512 and 256 pixels: the ladder from a plain step to the fastest one (:mod:`bench.sd_ladder`), in
pictures a second and model FLOPs utilisation; then the trainer's loop over the bare one, and over
one that encodes pictures and captions itself. ``--small`` runs a toy of it on any machine, to see
that it works; its figures say nothing. ``python -m bench.sd 512``: that size alone; with
``--compare``: without the ladder.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from bench import SMALL
from bench.legs import over, steady
from bench.loops import bare, encoding, times
from bench.sd_encoders import TOKENS, WIDTH, sd_encoders
from bench.sd_ladder import ladder
from bench.sd_model import DEVICE, SIZES, Size, in_bfloat16, random_batch, stable_diffusion
from bench.synthetic import write_latents
from ldm.cache import LatentCache
from ldm.config import NoiseSchedule, Train
from ldm.denoiser import Denoiser
from ldm.device import plain_attention
from ldm.noise_schedule import fresh_schedule
from ldm.tracking.live import Live
from ldm.train.compilation import compile_steps
from ldm.train.data import Batch
from ldm.train.objective import Objective
from ldm.train.settings import accelerator_for, settled_training
from ldm.train.trainer import Trainer
from ldm.unet import Network

ROUNDS = 5
STEPS = 1 if SMALL else 24
"""In turns: more than the loader makes ahead."""


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

    All on one network, compiled once for all.
    """
    torch.compiler.reset()
    unet = stable_diffusion()
    compile_steps(unet, DEVICE, 1)
    write_cache(size, folder)
    pictures = STEPS * size.full
    title = f"{size.pixels} pixels, batch {size.full}, compiled: pictures/s"
    fixed = random_batch(size, size.full)
    plain = times(STEPS, bare(unet, lambda: fixed, in_bfloat16))
    online = times(STEPS, bare(unet, encoding_at(size), in_bfloat16))
    ours = partial(training, unet, size, folder)
    over(title, ("bare loop", plain), partial(ours, "1"), pictures, ROUNDS)
    over(title, ("encoding", online), partial(ours, "2"), pictures, 3)


def write_cache(size: Size, folder: Path) -> None:
    """Latents for two steps."""
    side = size.pixels // 8
    write_latents(folder / "latents", 2 * size.full, (8, side, side), (TOKENS, WIDTH), "float16")


def training(unet: Network, size: Size, folder: Path, run: str, live: Live) -> Trainer:
    """The trainer on cached latents."""
    cache, workers = LatentCache(folder / "latents", "train"), 0 if SMALL else 4
    asked = Train(batch_size=size.full, workers=workers, **steady(STEPS))
    config = settled_training(asked, DEVICE)
    objective = Objective.of(fresh_schedule(NoiseSchedule()), config.min_snr_gamma)
    accelerator = accelerator_for(config, DEVICE)
    (folder / run).mkdir()
    parts = accelerator, config, objective, cache, cache, Denoiser(unet), folder / run
    return Trainer(*parts, live=live)


def encoding_at(size: Size) -> Callable[[], Batch]:
    """Batches by a VAE and a CLIP of Stable Diffusion's size, in bfloat16."""
    with DEVICE:
        vae, clip = (one.to(torch.bfloat16) for one in sd_encoders(small=SMALL))
    pictures = torch.randn(size.full, 3, size.pixels, size.pixels, device=DEVICE)
    ids = torch.randint(0, 49406, (size.full, TOKENS), device=DEVICE)
    return encoding(vae, clip, pictures, ids, nullcontext)


if __name__ == "__main__":
    main()
