"""Starting stages under ``accelerate launch``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from subprocess import CalledProcessError
from types import FrameType

import psutil
import torch

from ldm.aliases import fixed
from ldm.config import Accelerate, Params, Section
from ldm.device import CPU_ASKED, device_of
from ldm.errors import UserError
from ldm.params import load_section
from ldm.request import EncodeRequest, TrainRequest, leave
from ldm.termination import ASKING, taken_over

AUTO = "auto"
STOPPED = tuple(128 + number for number in ASKING)
"""Exit codes of who was asked to stop."""
ONE_PROCESS = {"cuda": "infra/accelerate/gpu.yaml", "cpu": "infra/accelerate/cpu.yaml"}
"""What ``auto`` is, by the device that there is."""


def launch_training(
    params: Params,
    latents: Path,
    out: Path,
    runs: Path,
    *,
    resume: Path | None = None,
    changed: bool = False,
) -> None:
    """Run :mod:`ldm.train` under ``accelerate launch``; see :func:`_launch`.

    The versions behind aliases are fixed here, and that of ``train.init`` kept with the model. Its
    sheets are drawn as evaluation draws.
    """
    train = params.train.model_copy(update={"init": fixed(params.train.init)})
    pipeline = fixed(params.pretrained.pipeline)
    request = TrainRequest(
        train=train,
        pretrained=params.pretrained.model_copy(update={"pipeline": pipeline}),
        latents=latents,
        out=out,
        runs=runs,
        resume=resume,
        changed=changed,
        registry=params.registry if train.track else None,
        sampling=params.evaluate.sampling,
    )
    # How long torchrun lets processes stop: by default 30 s, less than a large checkpoint takes.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(train.patience_s))
    try:
        _launch("train", train.accelerate, request)
    except SystemExit as ended:
        if train.track:
            # A trainer that was killed could not say so itself.
            from ldm.tracking.liveness import note_dead

            note_dead(params.registry, hurried=ended.code in STOPPED)
        raise


def launch_encoding(params: Params, images: Path, out: Path, runs: Path) -> None:
    """Run :mod:`ldm.encode` under ``accelerate launch``; see :func:`_launch`.

    The version behind an alias in ``pretrained.pipeline`` is fixed here, for all processes.
    """
    assert params.encode.accelerate is not None
    pipeline = fixed(params.pretrained.pipeline)
    request = EncodeRequest(
        encode=params.encode,
        pretrained=params.pretrained.model_copy(update={"pipeline": pipeline}),
        images=images,
        out=out,
        runs=runs,
    )
    _launch("encode", params.encode.accelerate, request)


def configuration_of(stage: str, named: str) -> tuple[str, Accelerate]:
    """The accelerate configuration that a stage's setting names: its file, and what it says.

    Raises :class:`UserError` where the file cannot be used, or asks for more GPUs than there are.
    """
    file = ONE_PROCESS[device_of().type] if named == AUTO else named
    if not Path(file).is_file():
        raise UserError(
            f"{file}: no such accelerate configuration; mend {stage}.accelerate, or run `ldm` in "
            "the folder that its path starts from"
        )
    settings = load_section(Accelerate, Path(file))
    wanted, there = settings.processes_here, _gpus_for(settings)
    if not settings.use_cpu and wanted > there:
        raise UserError(
            f"{file}: this machine has {there} of the {wanted} GPUs that it asks for; lower its "
            f"num_processes, or leave {stage}.accelerate at its default, which takes what there is"
        )
    return file, settings


def _gpus_for(settings: Accelerate) -> int:
    """How many GPUs of this machine a configuration's processes would find."""
    there = torch.cuda.device_count()
    if settings.gpu_ids in (None, "all"):
        return there
    return min(there, len(settings.gpu_ids.split(",")))


def _launch(stage: str, named: str, request: Section) -> None:
    """Run ``python -m ldm.STAGE`` in as many processes as the accelerate configuration says.

    The request is JSON in their environment. Raises :class:`SystemExit` with the exit code of the
    process that failed first. It has said why, or is said to have been killed. SIGTERM and Ctrl-C
    go on to the processes.
    """
    file, settings = configuration_of(stage, named)
    leave(request)
    os.environ[CPU_ASKED] = str(settings.use_cpu)  # accelerate says it to a lone process only.
    threads = str(_threads(settings.processes_here))
    arguments = ["--config_file", file, "--num_cpu_threads_per_process", threads]
    if settings.num_machines == 1 and settings.main_process_port is None:
        arguments += ["--main_process_port", "0"]  # Any that is free.
    try:
        code = _launched(*arguments, "-m", f"ldm.{stage}")
    except ValueError as error:
        raise UserError(f"{file}: accelerate refuses it ({str(error).splitlines()[0]})") from error
    if code == -signal.SIGKILL:
        killed = "a process was killed; the same command goes on from what is done"
        print(f"ldm {stage}: {killed}", file=sys.stderr)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def _threads(processes: int) -> int:
    """How many each process gets: what OMP_NUM_THREADS says, else its share of the cores.

    Left to itself, accelerate gives a lone CPU process one.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return max(1, len(os.sched_getaffinity(0)) // processes)


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
