"""Where a training step of :mod:`bench.sd_ladder` spends its time on the card, by kind of kernel.

``python -m bench.sd_profile 512 RUNG`` prints the kinds and the longest kernels.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from torch.profiler import ProfilerActivity, profile

from bench.compare import synchronize
from bench.sd_ladder import RUNGS, asked, operations, stepping
from bench.sd_model import DEVICE, SIZES, random_batch, stable_diffusion
from ldm.device import plain_attention
from ldm.quiet import quieten

STEPS = 2
LONGEST = 25
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "optimizer": ("multi_tensor", "foreach", "lpnorm"),
    "norms, sums, layout": ("triton", "elementwise", "norm", "nchw", "transpose", "copy"),
    "convolution": ("conv", "fprop", "dgrad", "wgrad", "xmma"),
    "matrix product": ("gemm", "nvjet", "cublas", "cutlass", "splitk"),
}
"""What a kernel's name contains, the first kind that fits."""
COUNTED = {
    "aten.convolution": "convolution",
    "aten.convolution_backward": "convolution",
    "aten.bmm": "attention",
    "aten.mm": "matrix product",
    "aten.addmm": "matrix product",
}
"""The kind that does an operator's operations."""


@plain_attention(DEVICE)
def main() -> None:
    """Profile the asked rung."""
    quieten()
    sizes, rungs = asked()
    if not sizes or not rungs:
        there = ", ".join(str(size.pixels) for size in SIZES)
        sys.exit(f"bench: name a size ({there}) and a rung ({', '.join(RUNGS)})")
    size, rung, unet = sizes[0], RUNGS[rungs[0]], stable_diffusion()
    pictures = getattr(size, rung.batch)
    done: dict[str, float] = defaultdict(float)
    for operator, flops in operations(unet, size).items():
        done[COUNTED[operator]] += pictures * flops / 1e12
    with stepping(rung, unet, random_batch(size, pictures)) as step:
        for _ in range(4):
            step()
        synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            for _ in range(STEPS):
                step()
            synchronize()
    kernels = {
        event.key: event.self_device_time_total / STEPS / 1000
        for event in profiled.key_averages()
        if event.self_device_time_total and not event.key.startswith(("aten::", "Optimizer."))
    }
    table(f"{rung.name.removeprefix('+ ')}, {size.pixels} pixels", kernels, done)


def table(title: str, kernels: dict[str, float], done: dict[str, float]) -> None:
    """Print milliseconds a step by kind, with its TFLOP, and of the longest kernels."""
    kinds: dict[str, float] = defaultdict(float)
    for name, milliseconds in kernels.items():
        kinds[kind_of(name)] += milliseconds
    total = sum(kinds.values())
    print(f"\n{title}: {total:.1f} ms a step")
    print(f"{'kind':>20} {'ms':>8} {'share':>6} {'TFLOP':>8} {'TFLOP/s':>8}")
    for name, milliseconds in longest(kinds):
        rate = f"{done[name]:8.1f} {1000 * done[name] / milliseconds:8.0f}" if name in done else ""
        print(f"{name:>20} {milliseconds:8.1f} {milliseconds / total:6.1%} {rate}")
    for name, milliseconds in longest(kernels)[:LONGEST]:
        print(f"{milliseconds:29.1f} {milliseconds / total:6.1%}  {name[:110]}")


def longest(times: dict[str, float]) -> list[tuple[str, float]]:
    """By time, the longest first."""
    return sorted(times.items(), key=lambda item: -item[1])


def kind_of(kernel: str) -> str:
    """Of :data:`KINDS`."""
    name = kernel.lower()
    fits = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
    return next(fits, "other")


if __name__ == "__main__":
    main()
