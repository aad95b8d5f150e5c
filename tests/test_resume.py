"""Going on after a stop at an odd moment, and when a full disk or a damaged file was why."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ldm.request
import ldm.train.stage
import ldm.train.trainer
from ldm.artifacts import digest_tree
from ldm.config import Pretrained, Train
from ldm.errors import UserError
from ldm.request import REQUEST, TrainRequest, serve
from ldm.run_log import LOG, RunLog, entries
from ldm.sampling import Painter
from ldm.termination import Termination
from ldm.train.data import Batch, TrainingBatches
from ldm.train.objective import Objective
from ldm.train.state import TrainingState
from ldm.train.trainer import Trainer
from tests.disk import room_for
from tests.test_train import run_here, weights

EVERY: dict[str, Any] = {"log_every": 1, "checkpoint_every": 5, "validate_every": 3}
EVERY |= {"sample_every": 3, "sample_prompts": ["a red circle"]}
UNSEEN = {**EVERY, "sample_every": None}
"""Sheets take most of the time."""


@pytest.fixture(scope="module")
def undisturbed(
    pipeline: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Digests of the model of a training that nothing stopped."""
    return digest_tree(run_here(pipeline, latents, tmp_path_factory.mktemp("whole"), **EVERY))


@pytest.fixture(scope="module")
def accumulated(
    pipeline: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The same of one whose steps are of two micro-batches."""
    folder = tmp_path_factory.mktemp("accumulated")
    return digest_tree(run_here(pipeline, latents, folder, **UNSEEN, accumulation=2))


def run_of(folder: Path) -> Path:
    (log,) = folder.glob(f"runs/*/{LOG}")
    return log.parent


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in run_of(folder).glob("step-*"))


@pytest.mark.parametrize("at", [6, 12])
def test_a_stop_within_validation_leaves_it_to_the_next_start(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, str],
    at: int,
) -> None:
    whole, calls = ldm.train.trainer.validation_loss, []

    def stopped(*arguments: Any, **options: Any) -> dict[str, Any] | None:
        calls.append(1)
        if len(calls) == at // EVERY["validate_every"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments, **options)

    monkeypatch.setattr(ldm.train.trainer, "validation_loss", stopped)
    with pytest.raises(SystemExit, match="143"):
        run_here(pipeline, latents, tmp_path, **EVERY)
    monkeypatch.undo()
    assert checkpoints(tmp_path)[-1] == f"step-{at:08d}"
    last = entries(run_of(tmp_path) / LOG)[-1]
    assert last["step"] == at
    assert "val_loss" not in last
    assert digest_tree(run_here(pipeline, latents, tmp_path, **EVERY)) == undisturbed
    sheets = sorted(path.name for path in run_of(tmp_path).glob("*.png"))
    assert sheets == [f"samples-{step:08d}.png" for step in (3, 6, 9, 12)]


def test_a_stop_seen_in_a_step_waits_for_no_validation_and_no_sheet(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, str],
) -> None:
    whole, steps = Objective.loss, []

    def loss(self: Objective, *arguments: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            steps.append(1)
            if len(steps) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *arguments)

    monkeypatch.setattr(Objective, "loss", loss)
    with pytest.raises(SystemExit, match="143"):
        run_here(pipeline, latents, tmp_path, **EVERY)
    monkeypatch.undo()
    assert checkpoints(tmp_path)[-1] == "step-00000006"
    assert not (run_of(tmp_path) / "samples-00000006.png").exists()
    assert digest_tree(run_here(pipeline, latents, tmp_path, **EVERY)) == undisturbed
    assert (run_of(tmp_path) / "samples-00000006.png").exists()


@pytest.mark.parametrize(
    ("batch", "long_s", "saved"),
    [(1, None, []), (13, None, [5, 6]), (14, None, [6, 7]), (13, 0.0, [5, 6]), (13, 600.0, [6, 7])],
    ids=["the first", "alone", "its last part", "of several, long", "of several, short"],
)
def test_a_stop_amid_a_step_leaves_it(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accumulated: dict[str, str],
    batch: int,
    long_s: float | None,
    saved: list[int],
) -> None:
    """Two micro-batches are a step: the 13th is the first of step 7.

    Of several processes none may leave alone; they ask each other where a step takes long.
    """
    settings = {**UNSEEN, "accumulation": 2}
    loss, batches = Objective.loss, []

    def asked(self: Objective, *arguments: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            batches.append(1)
            if len(batches) == batch:
                os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *arguments)

    monkeypatch.setattr(Objective, "loss", asked)
    if long_s is not None:
        monkeypatch.setattr(ldm.train.trainer, "LONG_S", long_s)
        monkeypatch.setattr(Termination, "breaking", nullcontext)
    with pytest.raises(SystemExit, match="143"):
        run_here(pipeline, latents, tmp_path, **settings)
    monkeypatch.undo()
    assert len(batches) == (batch + 1 if long_s == 600 else batch)
    assert checkpoints(tmp_path) == [f"step-{step:08d}" for step in saved]
    assert digest_tree(run_here(pipeline, latents, tmp_path, **settings)) == accumulated


@pytest.mark.parametrize("at", [5, 6, 12], ids=["plain", "validated", "last"])
def test_a_stop_within_a_sheet_breaks_it_off(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A sheet of 20 steps, in a thread, which waits until the signal has come."""
    every = {**EVERY, "sample_every": at, "checkpoint_every": 4}
    whole = run_here(pipeline, latents, tmp_path / "whole", **every)
    trajectory, taken = Painter.trajectory, []

    def stopped(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        for number, latents in enumerate(trajectory(*arguments, **options)):
            taken.append(number)
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)
            yield latents

    monkeypatch.setattr(Painter, "trajectory", stopped)
    with pytest.raises(SystemExit, match="143"):
        run_here(pipeline, latents, tmp_path / "stopped", **every)
    monkeypatch.undo()
    assert max(taken) == 2
    run = run_of(tmp_path / "stopped")
    assert checkpoints(tmp_path / "stopped")[-1] == f"step-{at:08d}"
    assert not list(run.glob("*.png"))
    state = json.loads((run / f"step-{at:08d}" / "state.json").read_text())
    assert (state["val_loss"] is not None) == (at % EVERY["validate_every"] == 0)
    model = run_here(pipeline, latents, tmp_path / "stopped", **every)
    assert digest_tree(model) == digest_tree(whole)
    names = sorted(path.name for path in run.glob("*.png"))
    assert names == [f"samples-{step:08d}.png" for step in range(at, 13, at)]


def test_a_run_goes_on_with_another_accumulation(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same weights but for the order of sums, as with other processes."""
    whole, step = run_here(pipeline, latents, tmp_path / "whole"), Trainer.step

    def stopping(trainer: Trainer, number: int, *others: Any) -> Any:
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, number, *others)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(SystemExit, match="143"):
        run_here(pipeline, latents, tmp_path / "parts", accumulation=2)
    monkeypatch.undo()
    model = run_here(pipeline, latents, tmp_path / "parts", accumulation=4)
    assert checkpoints(tmp_path / "parts")[0] == "step-00000006"
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(model)[name], tensor, rtol=1e-3, atol=2e-4)


def test_every_validated_step_can_be_the_best(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    run_here(pipeline, latents, tmp_path, **EVERY, keep_checkpoints=9)
    found = [int(name.removeprefix("step-")) for name in checkpoints(tmp_path)]
    assert found == [3, 5, 6, 9, 10, 12]


# --- loaders


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_loader_ends_the_training_and_nothing_is_lost(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, str],
    workers: int,
) -> None:
    def fail() -> None:
        raise RuntimeError("no such latents")

    def run() -> Path:
        return run_here(pipeline, latents, tmp_path, **UNSEEN, workers=workers)

    instead_of_batch(monkeypatch, 11, fail)
    with pytest.raises(RuntimeError, match="no such latents"):
        served(monkeypatch, run)
    monkeypatch.undo()
    assert checkpoints(tmp_path)[-1] == "step-00000010"
    assert digest_tree(run()) == undisturbed


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_outside_is_one_line_whoever_made_the_batch(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def fail() -> None:
        raise UserError("train-00000.tar: is cut short; run `ldm encode` again")

    instead_of_batch(monkeypatch, 3, fail)
    with pytest.raises(SystemExit) as caught:
        served(
            monkeypatch, lambda: run_here(pipeline, latents, tmp_path, **UNSEEN, workers=workers)
        )
    assert caught.value.code == "ldm train: train-00000.tar: is cut short; run `ldm encode` again"


def test_a_loader_that_is_killed_ends_the_training_and_nothing_is_lost(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, str],
) -> None:
    """It dies while the training is in one of the two steps before."""

    def run() -> Path:
        return run_here(pipeline, latents, tmp_path, **UNSEEN, workers=1)

    instead_of_batch(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        SystemExit, match=r"another process of it is gone .*DataLoader worker \(pid"
    ):
        served(monkeypatch, run)
    monkeypatch.undo()
    assert checkpoints(tmp_path)[-1] == "step-00000006"
    assert digest_tree(run()) == undisturbed


def test_a_loader_that_makes_no_batch_is_not_waited_for_for_ever(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_batch(monkeypatch, 8, lambda: time.sleep(600))
    with pytest.raises(SystemExit, match=r"gone or stands still \(DataLoader timed out after 3 s"):
        served(
            monkeypatch,
            lambda: run_here(pipeline, latents, tmp_path, **UNSEEN, workers=1, patience_s=3),
        )
    assert checkpoints(tmp_path)[-1] == "step-00000006"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_does_not_wait_for_a_batch(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, str],
    workers: int,
) -> None:
    """The signal comes while the training waits for the eighth, or computes the one before."""

    def asleep() -> None:
        if workers:
            os.kill(os.getppid(), signal.SIGTERM)
            again = f"import os, time; time.sleep(1); os.kill({os.getppid()}, {signal.SIGTERM})"
            subprocess.Popen([sys.executable, "-c", again])  # As a launcher sends one more.
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)  # A thread cannot be left behind.

    instead_of_batch(monkeypatch, 8, asleep)
    begin = time.monotonic()
    with pytest.raises(SystemExit, match="143"):
        run_here(pipeline, latents, tmp_path, **UNSEEN, workers=workers)
    assert time.monotonic() - begin < 120
    monkeypatch.undo()
    assert digest_tree(run_here(pipeline, latents, tmp_path, **UNSEEN)) == undisturbed
    assert not multiprocessing.active_children()


def instead_of_batch(
    monkeypatch: pytest.MonkeyPatch, number: int, happens: Callable[[], None]
) -> None:
    """Have something happen where the micro-batch of this number is made."""
    make = TrainingBatches.__getitem__

    def disturbed(batches: TrainingBatches, micro_batch: int) -> Batch:
        if micro_batch == number:
            happens()
        return make(batches, micro_batch)

    monkeypatch.setattr(TrainingBatches, "__getitem__", disturbed)


def served(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """Run it as a launched process does, but that this one outlives its launcher."""
    nowhere = Path()
    asked = TrainRequest(
        train=Train(), pretrained=Pretrained(), latents=nowhere, out=nowhere, runs=nowhere
    )
    monkeypatch.setenv(REQUEST, asked.model_dump_json())
    monkeypatch.setattr(ldm.request, "ask_when_orphaned", lambda: None)
    serve("train", TrainRequest, lambda _: run())


# --- the log


def stopped_after(folder: Path, step: int) -> None:
    """As if killed then: no later checkpoint, and the log is longer."""
    for path in run_of(folder).glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "model")


def test_a_line_that_was_cut_short_is_written_again(
    pipeline: Path, latents: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    run_here(pipeline, latents, tmp_path, **EVERY, keep_checkpoints=9)
    stopped_after(tmp_path, 6)
    log = run_of(tmp_path) / LOG
    log.write_bytes(log.read_bytes()[:-20])
    model = run_here(pipeline, latents, tmp_path, **EVERY, keep_checkpoints=9)
    assert digest_tree(model) == undisturbed


@pytest.mark.parametrize("line", [b'{"st', b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / LOG).write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"log\.jsonl: line 2 is damaged .*; remove that line"):
        RunLog(tmp_path / LOG, 3, writes=True)


def test_a_full_disk_is_told_and_the_run_goes_on_with_room(tmp_path: Path) -> None:
    log = RunLog(tmp_path / LOG, 0, writes=True)
    for step in range(1, 21):
        log.write({"step": step, "loss": 0.123456})
    size = (tmp_path / LOG).stat().st_size
    with room_for(size + 10), pytest.raises(UserError, match=r"log\.jsonl: cannot be written"):
        log.write({"step": 21, "loss": 0.123456})
    assert not (tmp_path / LOG).read_text().endswith("\n")
    kept = RunLog(tmp_path / LOG, 30, writes=True).kept
    assert [entry["step"] for entry in kept] == list(range(1, 21))


# --- figures that are not finite


def test_steps_skipped_before_a_stop_count(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Objective.loss

    def loss(*arguments: Any) -> torch.Tensor:
        each: torch.Tensor = whole(*arguments)
        return each * torch.nan if torch.is_grad_enabled() else each

    monkeypatch.setattr(Objective, "loss", loss)
    settings = {**EVERY, "max_skipped": 7, "validate_every": 100, "checkpoint_every": 4}
    with pytest.raises(UserError, match="step 8: no finite loss or gradient for 8 steps in a row"):
        run_here(pipeline, latents, tmp_path, **settings)
    assert checkpoints(tmp_path) == ["step-00000004"]
    with pytest.raises(UserError, match="step 8: no finite loss or gradient for 8 steps in a row"):
        run_here(pipeline, latents, tmp_path, **settings)


# --- several processes


def test_processes_that_find_different_checkpoints_do_not_begin(tmp_path: Path) -> None:
    others = SimpleNamespace(device="cpu", gather=lambda own: torch.cat((own, own + 20)))
    state = TrainingState(others, *(None,) * 3, sharded=False)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"checkpoints of different steps there \(0, 20\); let all"):
        state.resume(tmp_path, None, 100)
