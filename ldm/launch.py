"""Starting the trainer under ``accelerate launch``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from subprocess import CalledProcessError
from types import FrameType

import psutil
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ldm.config import Params, Registry
from ldm.errors import UserError
from ldm.progress import say
from ldm.termination import taken_over


def launch_training(
    params: Params,
    latents: Path,
    out: Path,
    runs: Path,
    *,
    resume: Path | None = None,
    changed: bool = False,
) -> None:
    """Run ``ldm.train`` with the accelerate configuration that the settings name.

    The version behind an alias in ``train.init`` is fixed here, and kept with the model. Raises
    :class:`SystemExit` with the trainer's own exit code when it fails; it has said why. SIGTERM and
    Ctrl-C go on to the trainer, which saves and leaves.
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
        "resume": str(resume) if resume else None,
        "changed": changed,
        "registry": params.registry.as_dict() if params.train.track else None,
    }
    os.environ["LDM_TRAIN"] = json.dumps(request)
    # Left to itself, accelerate gives a lone CPU process one thread.
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    code = _launched(
        *("--config_file", str(config), "--num_cpu_threads_per_process", str(threads)),
        *("-m", "ldm.train"),
    )
    if code:
        if params.train.track:
            _note_dead(params.registry)
        raise SystemExit(code)


def _note_dead(registry: Registry) -> None:
    """A trainer that was killed could not say so itself."""
    from ldm.live import note_dead

    try:
        note_dead(registry)
    except UserError as error:
        say(f"train: {error}")


def _launched(*arguments: str) -> int:
    """The exit code of ``accelerate launch``'s processes, by the shell's convention."""
    code = 0
    with taken_over(_forward):
        try:
            launch_command(launch_command_parser().parse_args(arguments))
        except CalledProcessError as failed:
            code = failed.returncode
        except ChildFailedError as failed:
            code = failed.get_first_failure()[1].exitcode
        except SignalException as stopped:
            code = -stopped.sigval
    return code if code >= 0 else 128 - code


def _forward(number: int, _: FrameType | None) -> None:
    """Ask the trainer to stop; leave where there is none yet."""
    children = psutil.Process().children()
    if not children:
        raise SystemExit(128 + number)
    for child in children:
        child.terminate()
