"""The promotion flow: let the gate decide on the challenger, or put the former champion back."""

from __future__ import annotations

import sys
from pathlib import Path

from prefect import flow, get_run_logger

from flows.process import run

ROOT = Path(__file__).resolve().parent.parent


@flow(name="promote")
def promote(rollback: bool = False, root: Path = ROOT) -> str:
    """Run ``ldm promote``; its line of result."""
    arguments = ["promote", *(["--rollback"] if rollback else [])]
    lines = run([sys.executable, "-m", "ldm.cli", *arguments], root, get_run_logger().info)
    return lines[-1]


if __name__ == "__main__":
    promote()
