"""The batch generation flow: a file of prompts to a folder of pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prefect import flow, get_run_logger

from flows.process import run

ROOT = Path(__file__).resolve().parent.parent


@flow(name="generate")
def generate(
    prompts: str,
    out: str | None = None,
    model: str = "models:/ldm@champion",
    seed: int = 0,
    root: Path = ROOT,
) -> str:
    """Run ``ldm generate`` on a prompts file; its line of result."""
    arguments = ["--model", model, "--prompts", prompts, "--seed", str(seed)]
    arguments += ["--out", out] if out else []
    command = [sys.executable, "-m", "ldm.cli", "generate", *arguments]
    return run(command, root, get_run_logger().info)[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts")
    parser.add_argument("--out")
    parser.add_argument("--model", default="models:/ldm@champion")
    parser.add_argument("--seed", type=int, default=0)
    generate(**vars(parser.parse_args()))
