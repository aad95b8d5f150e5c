"""``ldm train`` as a user starts it, over the bare loop: processes of their own, in turns.

With its launcher, log, loader and MLflow, at ``tiny``; timed from outside, by its log, between two
of its steps, without the validation and checkpoints that come before and after. How long it takes
to its first step :mod:`bench.start` says. Needs ``artifacts/latents`` (``make demo`` makes it).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.compare import in_turns
from bench.trainer import BATCH, DEVICE, LATENTS, STEPS, first_batch, repeated
from ldm.device import plain_attention
from ldm.memory import keep_memory
from ldm.run_log import LOG

ROUNDS = 5
FIRST, LAST = 100, 240
"""Steps between which the speed is taken; both stand in the log by default.

Before the first of them MLflow has been imported beside the training.
"""


def main() -> None:
    """Print both speeds by round, and their ratios."""
    if "--bare" in sys.argv:
        print(bare_speed())
        return
    title = f"training, tiny, batch {BATCH}, as it is started: samples a second"
    in_turns(title, ("bare loop", bare_in_its_process), ("ldm train", launched_speed), ROUNDS)


def bare_in_its_process() -> float:
    """:func:`bare_speed` of a process of its own."""
    command = [sys.executable, "-m", "bench.launched", "--bare"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@plain_attention(DEVICE)
def bare_speed() -> float:
    """Of the step that does what it must, on one batch."""
    keep_memory(DEVICE)
    batch = first_batch()
    steps = repeated(lambda: batch)
    for _ in range(FIRST // STEPS):
        steps()
    begin = time.perf_counter()
    for _ in range((LAST - FIRST) // STEPS):
        steps()
    return (LAST - FIRST) * BATCH / (time.perf_counter() - begin)


def launched_speed() -> float:
    """Of ``ldm train`` with its default settings."""
    with training() as comes:
        begin = comes(FIRST)
        return (LAST - FIRST) * BATCH / (comes(LAST) - begin)


@contextmanager
def training(*settings: str) -> Iterator[Callable[[int], float]]:
    """``ldm train`` in a folder of its own; what waits for a step and says when that came."""
    with tempfile.TemporaryDirectory() as name, (Path(name) / "said").open("w+") as said:
        paths = [f"--latents={LATENTS}", f"--out={name}/model", f"--runs={name}/runs"]
        sets = [f"--set=train.{one}" for one in settings]
        sets.append(f"--set=registry.tracking_uri=sqlite:///{name}/mlflow.db")
        command = [sys.executable, "-m", "ldm.cli", "train", *paths, *sets]
        with subprocess.Popen(command, stderr=said, start_new_session=True) as stage:

            def comes(step: int) -> float:
                while not any(reached(log, step) for log in Path(name).glob(f"runs/*/{LOG}")):
                    if stage.poll() is not None:
                        said.seek(0)
                        sys.exit(f"bench: the training ended before step {step}: {said.read()}")
                    time.sleep(0.05)
                return time.perf_counter()

            try:
                yield comes
            finally:
                stage.send_signal(signal.SIGTERM)


def reached(log: Path, step: int) -> bool:
    """Whether the line of that step, or of a later one, stands in a log."""
    lines = log.read_text().splitlines()[-1:]
    return bool(lines) and json.loads(lines[0])["step"] >= step


if __name__ == "__main__":
    main()
