"""Running a stage in a process group of its own, its output in the run's log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prefect import get_run_logger

ROOT = Path(__file__).resolve().parent.parent
"""The checkout that these flows are of."""
PATIENCE_S = 25
"""How long a stage that is asked to stop may take; the flow itself has 30 s from Prefect."""


def stop_in_order() -> None:
    """Have SIGTERM end this process as an exit does, with Prefect's temporary server.

    For a flow that is run by hand. Prefect sends itself the signal once more when the flow is over,
    and by that alone a process dies at once.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def run_ldm(*arguments: str, root: Path) -> str:
    """Run ``ldm`` with these arguments, as :func:`run` does, and return its line of result."""
    lines = run([sys.executable, "-m", "ldm.cli", *arguments], root, get_run_logger().info)
    return lines[-1] if lines else ""


def run(command: Sequence[str], root: Path, log: Callable[[str], None]) -> list[str]:
    """Run to the end and return the output's lines, each passed to ``log`` as it comes.

    Raises :class:`subprocess.CalledProcessError` on a non-zero exit. Whatever ends this call early,
    a cancelled run included, ends the whole process group: a killed ``dvc`` would leave its stage.
    """
    lines = []
    with _group(command, root) as process:
        assert process.stdout is not None
        for line in _lines(process.stdout):
            lines.append(line)
            log(line)
        if process.wait():
            raise subprocess.CalledProcessError(
                process.returncode, list(command), output="\n".join(lines)
            )
    return lines


def _lines(stream: Iterator[str]) -> Iterator[str]:
    """Lines without the frames that a progress bar overwrote."""
    for line in stream:
        text = line.rstrip("\n").rsplit("\r", 1)[-1].rstrip()
        if text:
            yield text


@contextmanager
def _group(command: Sequence[str], root: Path) -> Iterator[subprocess.Popen[str]]:
    here = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": here + os.pathsep + os.environ.get("PATH", "")}
    with subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Ask the group to stop, and kill it if it does not.

    Its output is read on until then: a training that stops in good order, long after ``dvc``, would
    fail at writing to a closed pipe.
    """
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
