"""Which device it is, and that precision follows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.batches import in_full_batches
from ldm.config import Sampling
from ldm.device import (
    CPU_ASKED,
    autocast,
    device_of,
    has_bfloat16,
    plain_attention,
    precision_of,
    settled_sampling,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(
    ("asked", "cpu"), [(None, False), ("False", False), ("True", True), ("true", True), ("1", True)]
)
def test_a_launcher_may_ask_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, asked: str | None, cpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv(CPU_ASKED)
    if asked is not None:
        monkeypatch.setenv(CPU_ASKED, asked)
    assert device_of().type == ("cuda" if gpu and not cpu else "cpu")


def test_a_cpu_has_bfloat16_if_its_flags_say_so() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_bfloat16(CPU) == bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


@pytest.mark.parametrize("able", [True, False])
def test_auto_is_what_the_device_can(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    names = {"avx512_bf16": able, "bf16": able, "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: names)
    wanted = "bfloat16" if able else "float32"
    assert precision_of("auto", CPU) == wanted
    assert settled_sampling(Sampling(compute="auto"), CPU).compute == wanted
    with autocast(CPU, "auto"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == getattr(torch, wanted)


def test_a_named_precision_is_kept() -> None:
    for compute in ("float32", "bfloat16"):
        assert precision_of(compute, CPU) == compute
        with autocast(CPU, compute):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, compute)


@pytest.mark.parametrize("reduced", [True, False])
def test_attention_is_plain_in_a_training_alone(reduced: bool) -> None:
    cuda = torch.backends.cuda

    def fail_in(found: tuple[bool, bool]) -> None:
        assert found == (False, True)
        raise KeyError

    def switches() -> tuple[bool, bool]:
        return cuda.flash_sdp_enabled(), cuda.fp16_bf16_reduction_math_sdp_allowed()

    before = switches()
    cuda.allow_fp16_bf16_reduction_math_sdp(reduced)
    try:
        with pytest.raises(KeyError), plain_attention(CPU):
            fail_in(switches())
        assert switches() == (before[0], reduced) and before[0]
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(before[1])
    with plain_attention(torch.device("cuda")):
        assert switches() == before


def test_threads_that_compute_are_on_the_gpu_of_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself each new thread is on the first: of two processes, one's weights are on another."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    found = list(in_full_batches(lambda batch: np.array(batch), range(5), 2, at_a_time=2))
    assert found == [*range(5)]
    assert chosen and set(chosen) == {3}
