"""The promotion flow: let the gate decide on the challenger, or put the former champion back."""

from __future__ import annotations

import argparse
from pathlib import Path

from prefect import flow

from flows.process import ROOT, run_ldm, stop_in_order


@flow(name="promote")
def promote(rollback: bool = False, version: str | None = None, root: Path = ROOT) -> str:
    """Run ``ldm promote``; its line of result."""
    arguments = ["--rollback"] if rollback else []
    arguments += ["--version", version] if version else []
    return run_ldm("promote", *arguments, root=root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollback", action="store_true", help="put the former champion back")
    parser.add_argument("--version", help="decide on this one, not the challenger")
    stop_in_order()
    promote(**vars(parser.parse_args()))
