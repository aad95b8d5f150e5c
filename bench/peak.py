"""``python -m bench.peak COMMAND ...``: run a command, print the peak of its memory in KiB.

A small process of its own, because a child's peak begins with what its parent holds.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT

ROOT = Path(__file__).resolve().parent.parent


def peak(command: list[str], folder: str = ".") -> float:
    """Peak resident memory, in MiB, of the largest process of a command that succeeds there."""
    return peak_and_words(command, folder)[0]


def peak_and_words(command: list[str], folder: str = ".") -> tuple[float, str]:
    """The same, and what the command says on either stream."""
    measured = [sys.executable, "-m", "bench.peak", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        measured, cwd=folder, env=environment, text=True, stdout=PIPE, stderr=STDOUT
    )
    if done.returncode:
        sys.exit(f"bench: {' '.join(command)} failed:\n{done.stdout}")
    return int(done.stdout.splitlines()[-1]) / 1024, done.stdout


if __name__ == "__main__":
    subprocess.run(sys.argv[1:], check=True)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
