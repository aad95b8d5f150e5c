"""Which device to compute on, how it likes to be used, and in which precision it is fast."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.config import Sampling

SamplingKind = TypeVar("SamplingKind", bound=Sampling)

CPU_ASKED, TRUE = "ACCELERATE_USE_CPU", {"1", "true", "t", "yes", "y", "on"}
"""Where ``accelerate launch`` tells its processes to use the CPU, and how."""
CPU_BFLOAT16 = {"x86_64": ("avx512_bf16", "amx_bf16"), "aarch64": ("bf16",)}
"""Capabilities of a CPU, any of which multiplies bfloat16 in hardware."""


def device_of() -> torch.device:
    """The first CUDA device if there is one, else the CPU; the CPU, too, where that is asked for.

    A launcher asks by :data:`CPU_ASKED`, which accelerate itself goes by.
    """
    cpu_asked = os.environ.get(CPU_ASKED, "").lower() in TRUE
    return torch.device("cpu" if cpu_asked or not torch.cuda.is_available() else "cuda")


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
