"""A training that is killed again and again, anywhere, ends in the bytes of one that was not.

``make test-slow`` runs this; each seed is another sequence of kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from subprocess import Popen

import psutil
import pytest

from ldm.artifacts import opening
from tests.launched import launch, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.kills]

KILLS = 10
SETTINGS = {"steps": 120, "checkpoint_every": 4, "validate_every": 12, "log_every": 1}
CASES = {
    "one process": {"workers": 1, "accumulation": 2},
    "text encoder too": {"text_learning_rate": 1e-4},
    "two processes": {"accelerate": "infra/accelerate/cpu-ddp.yaml", "accumulation": 2},
    "weights in parts": {"accelerate": "infra/accelerate/cpu-fsdp.yaml"},
}


def kill_ldm(process: Popen[bytes]) -> None:
    process.kill()


def kill_group(process: Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_trainer(process: Popen[bytes]) -> None:
    for trainer in psutil.Process(process.pid).children()[-1:]:
        trainer.kill()


def terminate(process: Popen[bytes]) -> None:
    process.terminate()


def stop_and_kill(process: Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGKILL)


CODES: dict[Callable[[Popen[bytes]], None], int] = {
    kill_ldm: 137,
    kill_group: 137,
    kill_trainer: 137,
    terminate: 143,
    stop_and_kill: 137,
}
"""What a shell sees ``ldm train`` end with, by way of killing it."""


@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_it_ends_in_the_same_bytes(
    pipeline: Path, latents: Path, tmp_path: Path, case: str
) -> None:
    rng = random.Random(case)
    settings = {**SETTINGS, **CASES[case]}
    assert launch(pipeline, latents, tmp_path / "straight", **settings).wait() == 0
    ways = [way for way, _ in zip(cycle(CODES), range(KILLS), strict=False)]
    rng.shuffle(ways)
    for number, way in enumerate(ways):
        process = launch(pipeline, latents, tmp_path / "killed", **settings)
        wanted = SETTINGS["steps"] * (number + 1) // (KILLS + 1)
        wait_for(partial(has_done, tmp_path / "killed", wanted), process)
        time.sleep(rng.uniform(0, 0.1))
        way(process)
        code = process.wait()
        assert (code if code >= 0 else 128 - code) == CODES[way]
    assert launch(pipeline, latents, tmp_path / "killed", **settings).wait() == 0
    straight, killed = (
        opening(tmp_path / name / "model", "model", "train") for name in ("straight", "killed")
    )
    assert straight.files == killed.files


def test_another_number_of_processes_goes_on_alike(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    """The same samples in the same batches: what differs is the order of sums."""
    together = {"accelerate": "infra/accelerate/cpu-ddp.yaml"}
    assert launch(pipeline, latents, tmp_path / "one").wait() == 0
    process = launch(pipeline, latents, tmp_path / "both", **together)
    wait_for(partial(has_done, tmp_path / "both", 10), process)
    terminate(process)
    assert process.wait() == 143
    assert launch(pipeline, latents, tmp_path / "both").wait() == 0
    one, both = (losses(tmp_path / name) for name in ("one", "both"))
    assert both == pytest.approx(one, abs=2e-5) and len(one) == 30


def losses(folder: Path) -> list[float]:
    """Of a training's log, in the order of its steps."""
    lines = [json.loads(line) for line in (folder / "model" / "log.jsonl").open()]
    return [line["loss"] for line in lines if "loss" in line]


def has_done(folder: Path, steps: int) -> bool:
    """Whether the log has so many steps, each a line."""
    logs = folder.glob("runs/*/log.jsonl")
    return sum(log.read_text().count('"loss"') for log in logs) >= steps
