"""Training at the size of Stable Diffusion 1, random weights: needs a GPU of some 70 GB.

For 512 and 256 pixels: the ladder from a plain step to the fastest one, in pictures a second and
model FLOPs utilisation; then the trainer's step over the bare one, and over one that encodes
pictures and captions itself. ``--small`` runs a toy of it on any machine, to see that it works; its
figures say nothing. ``python -m bench.sd 512``: that size alone.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import SMALL
from bench.compare import compare
from bench.loops import Precision, bare, encoding
from bench.sd_encoders import TOKENS, WIDTH, sd_encoders
from bench.synthetic import write_latents
from ldm.cache import LatentCache
from ldm.config import NoiseSchedule, Train
from ldm.denoiser import Denoiser
from ldm.device import device_of, plain_attention
from ldm.noise_schedule import fresh_schedule
from ldm.run_log import LOG, RunLog
from ldm.termination import Termination
from ldm.train.data import Batch
from ldm.train.objective import Objective
from ldm.train.settings import accelerator_for, settled_training
from ldm.train.skipped import SkippedSteps
from ldm.train.trainer import Trainer
from ldm.unet import Network, denoise, from_scratch

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Operations a second with dense bfloat16 matrices, by the makers' data sheets (SXM)."""
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Size:
    """Pixels of a picture's side, and pictures of a plain and of a full batch."""

    pixels: int
    plain: int
    full: int


SIZES = (Size(64, 1, 2),) if SMALL else (Size(512, 4, 32), Size(256, 16, 128))
DEVICE = device_of()


@plain_attention(DEVICE)
def main() -> None:
    """Print the ladder and the two comparisons for each size."""
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"Stable Diffusion 1, random weights, on {card}, torch {torch.__version__}")
    unet = from_scratch(stable_diffusion()).train()
    for size in [one for one in SIZES if str(one.pixels) in sys.argv] or SIZES:
        ladder(unet, size)
        with tempfile.TemporaryDirectory() as folder:
            comparisons(unet, size, Path(folder))


def stable_diffusion() -> UNet2DConditionModel:
    """Its UNet, 860 M parameters, float32, on the device; or a toy with its ways in and out."""
    widths = (32, 64) if SMALL else (320, 640, 1280, 1280)
    depth = len(widths) - 1
    with DEVICE:
        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=widths,
            down_block_types=("CrossAttnDownBlock2D",) * depth + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * depth,
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
        )


def random_batch(size: Size, pictures: int) -> Batch:
    """What a step sees, on the device."""
    shape = (pictures, 4, size.pixels // 8, size.pixels // 8)
    latents, noise = torch.randn(2, *shape, device=DEVICE)
    texts = torch.randn(pictures, TOKENS, WIDTH, device=DEVICE)
    return Batch(latents, noise, texts, torch.randint(0, 1000, (pictures,), device=DEVICE))


def in_bfloat16() -> AbstractContextManager[Any]:
    """What all but the first rungs compute in."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def ladder(unet: Network, size: Size) -> None:
    """Print what each measure brings, ``+`` for those kept. Leaves the network compiled."""
    flops, peak = operations(unet, size), peak_of_card()
    print(
        f"\n{size.pixels} pixels, {flops / 1e12:.2f} TFLOP a picture and step\n"
        f"{'':>36} {'batch':>6} {'pictures/s':>11} {'MFU':>6} {'memory':>8}"
    )

    def rung(name: str, pictures: int, precision: Precision = in_bfloat16) -> None:
        batch = random_batch(size, pictures)
        speed, memory = measured(bare(unet, lambda: batch, precision), pictures)
        share = f"{speed * flops / peak:6.1%}" if peak else f"{'-':>6}"
        print(f"{name:>36} {pictures:6d} {speed:11.2f} {share} {memory:6.1f}GB", flush=True)

    # What was compiled for another size would be compiled for any size now, and be slower.
    torch.compiler.reset()
    unet._compiled_call_impl = None
    with sdpa_kernel(SDPBackend.MATH):
        rung("float32, attention by its formula", size.plain, nullcontext)
    rung("+ fused attention (SDPA)", size.plain, nullcontext)
    rung("+ bfloat16 (autocast)", size.plain)
    rung("+ full batch", size.full)
    lay_out(unet, torch.channels_last)
    rung("tried: channels last", size.full)
    lay_out(unet, torch.contiguous_format)
    torch.backends.cudnn.benchmark = True
    rung("tried: cuDNN's fastest convolutions", size.full)
    torch.backends.cudnn.benchmark = False
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        rung("tried: attention by cuDNN", size.full)
    unet.compile()
    rung("+ torch.compile", size.full)


def lay_out(unet: Network, layout: torch.memory_format) -> None:
    """Have the weights of convolutions in this order in memory."""
    for parameter in unet.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def operations(unet: Network, size: Size) -> float:
    """Floating-point operations of a step for one picture, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        batch = random_batch(size, 1)
        denoise(unet, batch.latents, batch.timesteps, batch.texts).square().mean().backward()
    unet.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def measured(step: Callable[[], None], pictures: int) -> tuple[float, float]:
    """Pictures a second, the median of several steps, and the peak of memory in GB."""
    seconds = []
    for number in range(2 if SMALL else 9):
        begin = time.perf_counter()
        step()
        synchronize()
        if number > 2 or SMALL:
            seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return pictures / median(seconds), peak


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_of_card() -> float | None:
    """Of ``PEAK``, where the card is known there."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    return next((peak for known, peak in PEAK.items() if known in name), None)


def comparisons(unet: Network, size: Size, folder: Path) -> None:
    """Print our trainer over the bare loop and over the one that encodes at every step."""
    steps = 1 if SMALL else 256 // size.full
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
        compare(f"{title}: pictures/s", ("bare loop", plain), ("ldm train", ours), pictures, 3)
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
