"""The ladder of :mod:`bench.sd`: what each measure brings to a training step, a process each.

What a process has once computed decides how it goes on: cuDNN keeps its plans for a shape, and a
network is compiled for any size after the second. ``python -m bench.sd_ladder 512 RUNG ...`` prints
these rungs alone, ``--small`` a toy on any machine.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import SMALL
from bench.compare import synchronize
from bench.loops import bare
from bench.sd_model import (
    DEVICE,
    SIZES,
    Size,
    in_bfloat16,
    random_batch,
    stable_diffusion,
)
from ldm.device import plain_attention
from ldm.quiet import quieten
from ldm.train.compilation import CHANNELS_LAST
from ldm.train.data import Batch
from ldm.unet import Network, denoise

PEAK = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100-SXM": 312e12}
"""Operations a second with dense bfloat16 matrices, by the makers' data sheets, by card's name."""
FORMULA = (SDPBackend.MATH,)
FLASH_FIRST = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class Rung:
    """Settings of a step; what is not said is what PyTorch does by itself."""

    name: str
    batch: Literal["plain", "full", "large"] = "full"
    bfloat16: bool = True
    attention: Sequence[SDPBackend] = ()
    channels_last: bool = False
    search: bool = False
    """Whether cuDNN tries its convolutions."""
    compiled: Mapping[str, Any] | None = None
    """With these options of the compiler."""


RUNGS = {
    "formula": Rung("float32, attention by its formula", "plain", False, FORMULA),
    "fused": Rung("+ fused attention (SDPA)", "plain", False),
    "bfloat16": Rung("+ bfloat16 (autocast)", "plain"),
    "full": Rung("+ full batch"),
    "channels-last": Rung("tried: channels last", channels_last=True),
    "flash": Rung("tried: flash attention first", attention=FLASH_FIRST),
    "compile": Rung("+ torch.compile", compiled={}),
    "layout": Rung("tried: the compiler's channels last", compiled=CHANNELS_LAST),
    "weights": Rung("tried: + channels-last weights", channels_last=True, compiled={}),
    "search": Rung("tried: + cuDNN's fastest", search=True, compiled={}),
    "large": Rung("+ large batch", "large", compiled={}),
}


def ladder(size: Size, rungs: Sequence[str] = tuple(RUNGS)) -> None:
    """Print a row for each."""
    print(
        f"\n{f'{size.pixels} pixels':>36} {'batch':>6} {'pictures/s':>11} {'MFU':>6} {'memory':>8}"
    )
    for key in rungs:
        sys.stdout.flush()
        command = [sys.executable, "-m", "bench.sd_ladder", "--rung", str(size.pixels), key]
        subprocess.run([*command, *(["--small"] if SMALL else [])], check=True)


@plain_attention(DEVICE)
def climb(rung: Rung, size: Size) -> None:
    """Print the row of one, in a process of its own."""
    unet, pictures = stable_diffusion(), getattr(size, rung.batch)
    flops, peak = sum(operations(unet, size).values()), peak_of_card()
    try:
        with stepping(rung, unet, random_batch(size, pictures)) as step:
            speed, memory = measured(step, pictures)
    except torch.OutOfMemoryError:
        print(f"{rung.name:>36} {pictures:6d} {'does not fit':>11}", flush=True)
        return
    share = f"{speed * flops / peak:6.1%}" if peak else f"{'-':>6}"
    print(f"{rung.name:>36} {pictures:6d} {speed:11.2f} {share} {memory:6.1f}GB", flush=True)


@contextmanager
def stepping(rung: Rung, unet: Network, batch: Batch) -> Iterator[Callable[[], None]]:
    """A bare step by these settings."""
    torch.backends.cudnn.benchmark = rung.search
    if rung.channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if rung.compiled is not None:
        unet.compile(dynamic=False, options=dict(rung.compiled))
    step = bare(unet, lambda: batch, in_bfloat16 if rung.bfloat16 else nullcontext)
    with sdpa_kernel(list(rung.attention), set_priority=True) if rung.attention else nullcontext():
        yield step


def operations(unet: Network, size: Size) -> dict[str, float]:
    """Floating-point operations of a step for one picture, forward and backward, by operator.

    Those of the formulas: what fused attention computes again on the way back is not counted.
    """
    batch = random_batch(size, 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        denoise(unet, batch.latents, batch.timesteps, batch.texts).square().mean().backward()
    unet.zero_grad(set_to_none=True)
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


def measured(step: Callable[[], None], pictures: int) -> tuple[float, float]:
    """Pictures a second, the median of several steps, and the peak of memory in GB."""
    seconds = []
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(2 if SMALL else 12):
        begin = time.perf_counter()
        step()
        synchronize()
        if number > 2 or SMALL:
            seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0
    return pictures / median(seconds), peak


def peak_of_card() -> float | None:
    """Of ``PEAK``, where the card is known there."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    return next((peak for known, peak in PEAK.items() if known in name), None)


def asked() -> tuple[list[Size], list[str]]:
    """The sizes and rungs that the command names."""
    by_pixels = {str(size.pixels): size for size in SIZES}
    sizes = [by_pixels[word] for word in sys.argv[1:] if word in by_pixels]
    return sizes, [word for word in sys.argv[1:] if word in RUNGS]


def main() -> None:
    """Print the asked rungs, all without any; or, as ``ladder`` asks, one of them here."""
    quieten()
    sizes, rungs = asked()
    for size in sizes or SIZES:
        if "--rung" in sys.argv:
            climb(RUNGS[rungs[0]], size)
        else:
            ladder(size, rungs or tuple(RUNGS))


if __name__ == "__main__":
    main()
