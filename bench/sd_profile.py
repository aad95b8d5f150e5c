"""Where a training step of :mod:`bench.sd_ladder` spends its time on the card, by kind of kernel.

``python -m bench.sd_profile 512 RUNG`` prints the kinds and the longest kernels.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from torch.profiler import ProfilerActivity, profile

from bench.sd_ladder import RUNGS, stepping
from bench.sd_model import DEVICE, SIZES, random_batch, stable_diffusion, synchronize
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


@plain_attention(DEVICE)
def main() -> None:
    """Profile the asked rung."""
    quieten()
    by_pixels, asked = {str(size.pixels): size for size in SIZES}, sys.argv[1:]
    size = next((by_pixels[word] for word in asked if word in by_pixels), None)
    rung = next((RUNGS[word] for word in asked if word in RUNGS), None)
    if size is None or rung is None:
        sys.exit(f"bench: name a size ({', '.join(by_pixels)}) and a rung ({', '.join(RUNGS)})")
    batch = random_batch(size, getattr(size, rung.batch))
    with stepping(rung, stable_diffusion(), batch) as step:
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
    table(f"{rung.name.removeprefix('+ ')}, {size.pixels} pixels", kernels)


def table(title: str, kernels: dict[str, float]) -> None:
    """Print milliseconds a step by kind and of the longest kernels."""
    kinds: dict[str, float] = defaultdict(float)
    for name, milliseconds in kernels.items():
        kinds[kind_of(name)] += milliseconds
    total = sum(kinds.values())
    print(f"\n{title}: {total:.1f} ms a step")
    for name, milliseconds in longest(kinds):
        print(f"{name:>20} {milliseconds:8.1f} {milliseconds / total:6.1%}")
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
