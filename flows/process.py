"""Running a stage in a process group of its own, its output in the run's log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


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
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
