"""Starting the trainer under ``accelerate launch``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from ldm.config import Params
from ldm.errors import UserError


def launch_training(params: Params, latents: Path, out: Path, runs: Path) -> None:
    """Run ``ldm.train`` with the accelerate configuration that the settings name.

    The version behind an alias in ``train.init`` is fixed here, and kept with the model. Raises
    :class:`SystemExit` with the trainer's own exit code when it fails; it has said why.
    """
    config = Path(params.train.accelerate)
    if not config.is_file():
        raise UserError(f"{config}: no such accelerate configuration; see train.accelerate")
    processes = max(1, int(yaml.safe_load(config.read_text()).get("num_processes", 1)))
    train = params.train.as_dict()
    if params.train.init.startswith("models:/"):
        from ldm.registered import pinned

        train["init"] = pinned(params.train.init)
    request = {
        "train": train,
        "pretrained": params.pretrained.as_dict(),
        "latents": str(latents),
        "out": str(out),
        "runs": str(runs),
    }
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
        # Left to itself, accelerate gives a lone CPU process one thread.
        *("--num_cpu_threads_per_process", str(max(1, len(os.sched_getaffinity(0)) // processes))),
        *("-m", "ldm.train"),
    ]
    done = subprocess.run(command, env={**os.environ, "LDM_TRAIN": json.dumps(request)})
    if done.returncode:
        raise SystemExit(done.returncode)
