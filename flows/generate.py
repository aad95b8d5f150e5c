"""The batch generation flow: a file of prompts to a folder of pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from prefect import flow

from flows.process import ROOT, run_ldm, stop_in_order


@flow(name="generate")
def generate(
    prompts: str,
    out: str | None = None,
    model: str | None = None,
    seed: int | None = None,
    negative: str | None = None,
    num_images: int | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    rows_per_shard: int | None = None,
    fast: bool = False,
    root: Path = ROOT,
) -> str:
    """Run ``ldm generate`` on a prompts file; its line of result. What is not given is its own."""
    given = {
        **{"out": out, "model": model, "seed": seed, "negative": negative, "sampler": sampler},
        **{"steps": steps, "guidance": guidance, "height": height, "width": width},
        **{"num-images": num_images, "rows-per-shard": rows_per_shard},
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += ["--fast"] if fast else []
    return run_ldm("generate", f"--prompts={prompts}", *options, root=root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts")
    parser.add_argument("--out")
    parser.add_argument("--model", help="default: the champion of registry.model")
    parser.add_argument("--seed", type=int, help="default: generate.seed")
    parser.add_argument("--negative", help="for all prompts that have none")
    parser.add_argument("--num-images", type=int)
    parser.add_argument("--sampler")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--rows-per-shard", type=int)
    parser.add_argument("--fast", action="store_true")
    stop_in_order()
    generate(**vars(parser.parse_args()))
