"""A training that is killed again and again, anywhere, ends in the bytes of one that was not.

``make test-slow`` runs this; each seed is another sequence of kills.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest

from ldm.artifacts import digest_file, opening
from ldm.checkpoint import folders
from tests.launched import launch, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.kills]

SETTINGS: dict[str, Any] = {"steps": 120, "checkpoint_every": 4, "validate_every": 12}
SETTINGS |= {"log_every": 1}
SHEETS = {"sample_every": 35, "sample_prompts": ["a red circle"]}
CASES: dict[str, dict[str, Any]] = {
    "one process": {"workers": 1, "accumulation": 2},
    "text encoder too": {"text_learning_rate": 1e-4},
    "two processes": {
        "accelerate": "infra/accelerate/cpu-ddp.yaml",
        "accumulation": 2,
        "workers": 1,
        **SHEETS,
    },
    "weights in parts": {"accelerate": "infra/accelerate/cpu-fsdp.yaml", **SHEETS},
}


def all_of(process: Popen[bytes]) -> list[psutil.Process]:
    """``ldm train``, its trainers and their workers.

    Several trainers are no part of its process group: torchrun gives each a session of its own.
    """
    first = psutil.Process(process.pid)
    return [first, *first.children(recursive=True)]


def trainers(process: Popen[bytes]) -> list[psutil.Process]:
    """By rank."""
    return psutil.Process(process.pid).children()


def kill_ldm(process: Popen[bytes]) -> None:
    """The launcher alone; its trainers hear of that, save, and leave."""
    process.kill()


def kill_all(process: Popen[bytes]) -> None:
    """At once; until none is left."""
    killed = all_of(process)
    for one in killed:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    assert not psutil.wait_procs(killed, timeout=30)[1]


def kill_trainer(process: Popen[bytes]) -> None:
    trainers(process)[-1].kill()


def terminate(process: Popen[bytes]) -> None:
    process.terminate()


def stop_and_kill(process: Popen[bytes]) -> None:
    """All, where one has stood still for a while."""
    trainers(process)[-1].suspend()
    time.sleep(1)
    kill_all(process)


CODES: dict[Callable[[Popen[bytes]], None], int] = {
    kill_ldm: 137,
    kill_all: 137,
    kill_trainer: 137,
    terminate: 143,
    stop_and_kill: 137,
}
"""What a shell sees ``ldm train`` end with, by way of killing it."""
WAYS = (kill_ldm, *2 * (kill_all, kill_trainer, terminate, stop_and_kill))
PATIENCE_S = 30
"""How long one who asked it to stop waits for it."""
PAUSED = len(WAYS) // 2
"""Which launch has a trainer that stands still for a while, and goes on, before it is killed."""

Straight = Callable[[str], Path]


@pytest.fixture(scope="module")
def straight(pipeline: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Where a case was trained without a kill."""
    done: dict[str, Path] = {}

    def of(case: str) -> Path:
        if case not in done:
            done[case] = tmp_path_factory.mktemp("straight")
            settings = {**SETTINGS, **CASES[case]}
            assert launch(pipeline, latents, done[case], **settings).wait() == 0
        return done[case]

    return of


@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_it_ends_in_the_same_bytes(
    pipeline: Path, latents: Path, tmp_path: Path, straight: Straight, case: str
) -> None:
    rng = random.Random(case)
    settings = {**SETTINGS, **CASES[case]}
    for number, way in enumerate(rng.sample(WAYS, len(WAYS))):
        process = launch(pipeline, latents, tmp_path, **settings)
        wanted = SETTINGS["steps"] * (number + 1) // (len(WAYS) + 1)
        wait_for(partial(has_done, tmp_path, wanted), process)
        if number == PAUSED:
            stand_still(tmp_path, process)
            # So that there is a checkpoint with steps from after that.
            wait_for(partial(has_done, tmp_path, wanted + 9), process)
        time.sleep(rng.uniform(0, 0.1))
        before = saved(tmp_path)
        way(process)
        code = process.wait(PATIENCE_S)
        assert (code if code >= 0 else 128 - code) == CODES[way]
        if way in (kill_all, kill_trainer, stop_and_kill):
            # Nobody is left to save more than what was being saved.
            every = SETTINGS["checkpoint_every"]
            assert all(step % every == 0 for step in saved(tmp_path) - before)
    assert launch(pipeline, latents, tmp_path, **settings).wait() == 0
    assert_same(tmp_path, straight(case))


def stand_still(folder: Path, process: Popen[bytes]) -> None:
    """Stop the trainer that writes the log for some seconds: nothing is logged in the meantime."""
    first = trainers(process)[0]
    first.suspend()
    time.sleep(0.2)
    before = logged(folder)
    time.sleep(2)
    assert logged(folder) == before
    first.resume()


def assert_same(folder: Path, other: Path) -> None:
    """The same model, the same state at the end, and the same losses on the way there."""
    one, two = (opening(path / "model", "model", "train") for path in (folder, other))
    assert one.files == two.files
    state = last_state(folder)
    assert state == last_state(other)
    assert {"weights.safetensors", "ema.safetensors", "optimizer.safetensors"} < state.keys()
    assert losses(folder) == losses(other) and len(losses(folder)) == SETTINGS["steps"]


def last_state(folder: Path) -> dict[str, str]:
    """Digests of the files of a training's last checkpoint."""
    (run,) = (folder / "runs").iterdir()
    return {path.name: digest_file(path) for path in folders(run)[-1].iterdir()}


def saved(folder: Path) -> set[int]:
    """The steps that a training has checkpoints of."""
    return {int(path.name.removeprefix("step-")) for path in folder.glob("runs/*/step-*")}


TIMEOUT_S = 10


def test_a_trainer_that_stands_still_for_too_long_ends_it(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    straight: Straight,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The others say so, and the same command then goes on."""
    settings = {**SETTINGS, **CASES["two processes"], "patience_s": TIMEOUT_S}
    process = launch(pipeline, latents, tmp_path, **settings)
    wait_for(partial(has_done, tmp_path, 30), process)
    stopped, every = trainers(process)[-1], all_of(process)
    stopped.suspend()
    assert process.wait(TIMEOUT_S + 60) == 1
    assert not psutil.wait_procs(every, timeout=30)[1]
    assert not (tmp_path / "model").exists()
    assert "ldm train: another process of it is gone or stands still" in capfd.readouterr().err
    assert launch(pipeline, latents, tmp_path, **settings).wait() == 0
    assert_same(tmp_path, straight("two processes"))


def test_another_number_of_processes_goes_on_alike(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    """The same samples in the same batches: what differs is the order of sums."""
    together = {"accelerate": "infra/accelerate/cpu-ddp.yaml"}
    assert launch(pipeline, latents, tmp_path / "one").wait() == 0
    process = launch(pipeline, latents, tmp_path / "both", **together)
    wait_for(partial(has_done, tmp_path / "both", 10), process)
    terminate(process)
    assert process.wait(PATIENCE_S) == 143
    assert launch(pipeline, latents, tmp_path / "both").wait() == 0
    one, both = (losses(tmp_path / name) for name in ("one", "both"))
    assert both == pytest.approx(one, abs=2e-5) and len(one) == 30


def losses(folder: Path) -> list[float]:
    """Of a training's log, in the order of its steps."""
    lines = [json.loads(line) for line in (folder / "model" / "log.jsonl").open()]
    return [line["loss"] for line in lines if "loss" in line]


def has_done(folder: Path, steps: int) -> bool:
    """Whether the log has so many steps, each a line."""
    return logged(folder) >= steps


def logged(folder: Path) -> int:
    """How many steps the log has, each a line."""
    return sum(log.read_text().count('"loss"') for log in folder.glob("runs/*/log.jsonl"))
