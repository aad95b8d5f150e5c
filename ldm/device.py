"""Which device to compute on, how it likes to be used, and in which precision it is fast."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.config import Sampling

SamplingKind = TypeVar("SamplingKind", bound=Sampling)

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8
"""Numbers of ``malloc.h``."""
CPU_BFLOAT16 = {"x86_64": ("avx512_bf16", "amx_bf16"), "aarch64": ("bf16",)}
"""Capabilities of a CPU, any of which multiplies bfloat16 in hardware."""


def device_of() -> torch.device:
    """The first CUDA device if there is one, else the CPU; the process then keeps its memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        _keep_memory()
    return device


@contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """For a training: on a CPU, compute attention by the plain formula, in bfloat16 as well.

    On the short sequences of small latents the flash kernel's backward pass alone took 38 % of a
    training step; the plain formula makes the whole step a third faster. Left to itself it
    computes bfloat16 in float32; in bfloat16 a step takes 9 % less. Without a backward pass the
    flash kernel is the faster. (The switches are named after cuda, and are the whole process's.)
    """
    if device.type != "cpu":
        yield
        return
    reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(reduced)


def _keep_memory() -> None:
    """Have the C library keep what is freed up to 32 MB a piece, its most, for the next to ask.

    Given back to the system after every step, memory came back a page at a time: a tenth of a
    training step of ``tiny`` went into that. Threads besides the main one have their memory in
    heaps of 64 MB, and one that is empty goes whole unless as much may stand in reserve.
    """
    _set_malloc({M_MMAP_THRESHOLD: 32 * 2**20, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * 2**20})


def keep_large_memory(device: torch.device) -> None:
    """Have a CPU process keep pieces of any size, in one heap for all threads.

    For one whose threads compute large arrays and that holds little beside: the heap grows by a
    seventh. Encoding 256 pixels at Stable Diffusion's size took a quarter longer without, most
    of it in threads that waited for each other to give memory back.
    """
    if device.type == "cpu":
        _set_malloc({M_MMAP_MAX: 0, M_ARENA_MAX: 1})


def _set_malloc(options: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's.
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def only_deterministic() -> None:
    """From now on equal inputs give equal bits on a GPU too, as they do on a CPU anyway.

    What has no such way there raises RuntimeError. Call it before CUDA is used.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS shares its buffers out by chance.
    torch.use_deterministic_algorithms(True)
    # We read no memory that we did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware.

    A CPU without it emulates: a training step of ``tiny`` then takes fifteen times as long as in
    float32, where one with it takes half as long.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in CPU_BFLOAT16.get(platform.machine(), ()))


def precision_of(compute: str, device: torch.device) -> str:
    """``float32`` or ``bfloat16``; ``auto`` is whichever the device is fast in."""
    if compute == "auto":
        return "bfloat16" if has_bfloat16(device) else "float32"
    return compute


def settled_sampling(sampling: SamplingKind, device: torch.device) -> SamplingKind:
    """The same settings with the precision that the device gives ``auto``."""
    return sampling.model_copy(update={"compute": precision_of(sampling.compute, device)})


def autocast(device: torch.device, compute: str) -> AbstractContextManager[Any]:
    """Compute in this precision; ``auto`` as in :func:`precision_of`."""
    lower = precision_of(compute, device) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=lower)
