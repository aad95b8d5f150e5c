"""Starting stages under ``accelerate launch``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from subprocess import CalledProcessError
from types import FrameType
from typing import Any

import psutil
import yaml

from ldm.config import Params
from ldm.errors import UserError
from ldm.request import leave
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
    """Run :mod:`ldm.train.stage` under ``accelerate launch``; see :func:`_launch`.

    The version behind an alias in ``train.init`` is fixed here, and kept with the model.
    """
    train = params.train.as_dict()
    train["init"] = _fixed(params.train.init)
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
    try:
        _launch("train", params.train.accelerate, request)
    except SystemExit:
        if params.train.track:
            # A trainer that was killed could not say so itself.
            from ldm.tracking.liveness import note_dead

            note_dead(params.registry)
        raise


def launch_encoding(params: Params, images: Path, out: Path, runs: Path) -> None:
    """Run :mod:`ldm.encode.stage` under ``accelerate launch``; see :func:`_launch`.

    The version behind an alias in ``pretrained.pipeline`` is fixed here, for all processes.
    """
    assert params.encode.accelerate is not None
    pretrained = params.pretrained.as_dict()
    pretrained["pipeline"] = _fixed(params.pretrained.pipeline)
    request = {"encode": params.encode.as_dict(), "pretrained": pretrained, "images": str(images)}
    _launch("encode", params.encode.accelerate, request | {"out": str(out), "runs": str(runs)})


def processes_of(configuration: str) -> int:
    """How many processes an accelerate configuration asks for; UserError if there is no such file.

    At least one.
    """
    return max(1, int(_read(configuration).get("num_processes", 1)))


def _read(configuration: str) -> dict[str, Any]:
    if not Path(configuration).is_file():
        raise UserError(f"{configuration}: no such accelerate configuration; see `accelerate`")
    return dict(yaml.safe_load(Path(configuration).read_text()))


def _fixed(name: str) -> str:
    """The same name of a model, but for an MLflow alias the version behind it."""
    if not name.startswith("models:/"):
        return name
    from ldm.tracking.registered import pinned

    return pinned(name)


def _launch(stage: str, configuration: str, request: Mapping[str, Any]) -> None:
    """Run ``python -m ldm.STAGE.stage`` in as many processes as the accelerate configuration says.

    The request is JSON in their environment. Raises :class:`SystemExit` with the exit code of the
    process that failed first. It has said why, or is said to have been killed. SIGTERM and Ctrl-C
    go on to the processes.
    """
    leave(request)
    settings, processes = _read(configuration), processes_of(configuration)
    # Left to itself, accelerate gives a lone CPU process one thread.
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    arguments = ["--config_file", configuration, "--num_cpu_threads_per_process", str(threads)]
    if processes > 1 and "main_process_port" not in settings:
        arguments += ["--main_process_port", "0"]  # Any that is free.
    code = _launched(*arguments, "-m", f"ldm.{stage}.stage")
    if code == -signal.SIGKILL:
        killed = "a process was killed; the same command goes on from what is done"
        print(f"ldm {stage}: {killed}", file=sys.stderr)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def _launched(*arguments: str) -> int:
    """The exit code of ``accelerate launch``'s processes; of a signal, negative."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # We say it.
    with taken_over(_forward):
        try:
            launch_command(launch_command_parser().parse_args(arguments))
        except CalledProcessError as failed:
            return failed.returncode
        except ChildFailedError as failed:
            return failed.get_first_failure()[1].exitcode
        except SignalException as stopped:
            return -stopped.sigval
    return 0


def _forward(number: int, _: FrameType | None) -> None:
    """Ask the processes to stop; leave where there is none yet."""
    children = psutil.Process().children()
    if not children:
        raise SystemExit(128 + number)
    for child in children:
        child.terminate()
