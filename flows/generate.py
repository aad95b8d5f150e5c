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
    root: Path = ROOT,
) -> str:
    """Run ``ldm generate`` on a prompts file; its line of result. What is not given is its own."""
    given = {"--out": out, "--model": model, "--seed": seed}
    options = [f"{name}={value}" for name, value in given.items() if value is not None]
    return run_ldm("generate", f"--prompts={prompts}", *options, root=root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts")
    parser.add_argument("--out")
    parser.add_argument("--model", help="default: the champion of registry.model")
    parser.add_argument("--seed", type=int, help="default: generate.seed")
    stop_in_order()
    generate(**vars(parser.parse_args()))
