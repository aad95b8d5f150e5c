"""``ldm train`` as a process of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHORT = {"steps": 12, "batch_size": 8, "warmup_steps": 2, "validate_every": 6, "log_every": 2}
SHORT |= {"track": False}


def launch(pipeline: Path, latents: Path | str, folder: Path, **settings: object) -> Popen[bytes]:
    """``ldm train`` in a process group of its own; ``resume`` and ``changed`` are its options."""
    overrides = {**SHORT, "steps": 60, "checkpoint_every": 10, "mixed_precision": "no", **settings}
    command = [sys.executable, "-m", "ldm.cli", "train", "--params", str(ROOT / "params.yaml")]
    command += ["--latents", str(latents), "--out", str(folder / "model")]
    command += ["--runs", str(folder / "runs"), "--set", f"pretrained.pipeline={pipeline}"]
    if experiment := overrides.pop("experiment", None):
        command += ["--set", f"registry.experiment={experiment}"]
    if network := overrides.pop("network", None):
        command += ["--set", f"pretrained.network={network}"]
    if resume := overrides.pop("resume", None):
        command += ["--resume", str(resume)]
    if overrides.pop("changed", False):
        command += ["--changed"]
    for key, value in overrides.items():
        command += ["--set", f"train.{key}={value}"]
    return Popen(command, cwd=ROOT, start_new_session=True)


def wait_for(found: Callable[[], object], process: Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
