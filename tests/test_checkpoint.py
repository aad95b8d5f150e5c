"""Checkpoints survive what happens to files."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ldm.checkpoint
import ldm.saver
from ldm.artifacts import digest_file, digest_json
from ldm.checkpoint import (
    OWN,
    PARTS,
    STATE,
    Checkpoint,
    Model,
    averaged,
    damage_of,
    describe,
    folders,
    newest,
    save,
)
from ldm.errors import UserError
from ldm.optimizer_state import optimizer_tensors, restore_optimizer
from ldm.saver import Saver
from tests.disk import room_for


def at(step: int, val_loss: float | None = None) -> Checkpoint:
    tensors = {"weight": torch.full((3, 2), float(step))}
    return Checkpoint(step, tensors, tensors, {"0.step": torch.tensor(float(step))}, val_loss)


class Killed(BaseException):
    """Nothing of the program runs after it."""


CALLS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink", "open")
"""Of :mod:`os`; files are created and written by others."""
FAULTS = [OSError(errno.ENOSPC, "No space left on device"), Killed()]


@contextmanager
def failing(number: int, error: BaseException) -> Iterator[list[str]]:
    """The ``number``-th call into the file system, counted from 0, fails, and after a kill all do.

    Half of a file is written where its writing fails. Yields the names of the calls made.
    """
    made: list[str] = []
    numbers = count()  # Two threads make calls; no two calls get the same number.

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            past = next(numbers) - number
            made.append(name)
            if past == 0 or (past > 0 and isinstance(error, Killed)):
                raise error
            return call(*arguments, **options)

        return run

    class Written(io.FileIO):
        """Unbuffered: a kill leaves nothing to be written when it is closed."""

        def write(self, content: Any) -> int:
            half = len(content) // 2
            super().write(content[:half])
            return half + int(wrapped("write", super().write)(content[half:]))

    opened, create, save_file = Path.open, wrapped("create", Written), ldm.checkpoint.save_file

    def open_file(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return create(path, mode) if "w" in mode else opened(path, mode, *arguments, **options)

    def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
        """What safetensors does out of sight is done in sight before."""
        with path.open("wb") as file:
            file.write(safetensors.torch.save(tensors))
        save_file(tensors, path)

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        patch.setattr(Path, "open", open_file)
        patch.setattr(ldm.checkpoint, "save_file", save_tensors)
        yield made


def test_newest_comes_back(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, at(step), keep=2)
    found = newest(tmp_path)
    assert found is not None and found.step == 30
    assert torch.equal(found.ema["weight"], at(30).ema["weight"])
    assert [folder.name for folder in folders(tmp_path)] == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "no state"])
def test_a_damaged_one_is_passed_over(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, at(10), keep=3)
    latest = save(tmp_path, at(20), keep=3)
    weights = latest / "ema.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-4])
    elif damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    else:
        (latest / "state.json").write_text("{")
    assert str(latest) in (damage_of(latest) or "")
    found = newest(tmp_path)
    assert found is not None and found.step == 10
    assert str(latest) in capsys.readouterr().out


@pytest.mark.parametrize("error", FAULTS)
def test_a_fault_at_any_call_leaves_a_whole_newest(tmp_path: Path, error: BaseException) -> None:
    for number in range(100):
        run = tmp_path / str(number)
        for step in (10, 20):
            save(run, at(step), keep=2)
        with failing(number, error) as made:
            try:
                save(run, at(30), keep=1)
                went_through = len(made) <= number
            except (UserError, OSError, Killed):
                went_through = False
        found = newest(run)
        assert found is not None and found.step in (20, 30)
        assert torch.equal(found.weights["weight"], at(found.step).weights["weight"])
        save(run, at(40), keep=1)
        assert [one.name for one in run.iterdir()] == ["step-00000040"]
        if went_through:
            # Three files of tensors and state.json.
            assert made.count("create") == made.count("write") == 4
            assert {*made} == {*CALLS, "create", "write"}
            return
    raise AssertionError("never went through")


def test_all_is_on_disk_before_it_has_its_name_and_the_name_is_too(tmp_path: Path) -> None:
    with failing(1000, Killed()) as made:
        save(tmp_path, at(10), keep=1)
    named = made.index("rename")
    # Three files of tensors, state.json, and the folder; then the run's.
    assert made[:named].count("fsync") == 5
    assert made[named:].count("fsync") == 1


@pytest.mark.parametrize("error", FAULTS)
def test_a_fault_while_a_step_is_saved_again_loses_nothing(
    tmp_path: Path, error: BaseException
) -> None:
    for number in range(100):
        run = tmp_path / str(number)
        save(run, at(20), keep=2)
        with failing(number, error) as made, suppress(UserError, OSError, Killed):
            save(run, at(20, 0.5), keep=2)
        found = newest(run)
        assert found is not None and found.step == 20
        assert found.val_loss in (None, 0.5)
        if len(made) <= number:
            assert found.val_loss == 0.5
            return
    raise AssertionError("never went through")


def test_tensors_that_share_memory_are_saved_each(tmp_path: Path) -> None:
    table = torch.arange(4.0)
    save(tmp_path, Checkpoint(1, {}, {}, {"0.table": table, "1.table": table}), keep=1)
    found = newest(tmp_path)
    assert found is not None
    assert all(torch.equal(one, table) for one in found.optimizer.values())
    assert len(found.optimizer) == 2


def test_folders_of_another_name_are_no_checkpoints(tmp_path: Path) -> None:
    kept = save(tmp_path, at(10), keep=1)
    shutil.copytree(kept, tmp_path / "step-00000010.mine")
    assert folders(tmp_path) == [kept]


def test_a_full_disk_is_said_and_the_earlier_ones_stay(tmp_path: Path) -> None:
    save(tmp_path, at(10), keep=1)
    with (
        failing(3, OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(UserError, match=r"step-00000020: .*No space left.*make room"),
    ):
        save(tmp_path, at(20), keep=1)
    assert [one.name for one in tmp_path.iterdir()] == ["step-00000010"]


def test_a_disk_that_is_full_of_weights_is_said_by_safetensors(tmp_path: Path) -> None:
    with room_for(50), pytest.raises(UserError, match=r"step-00000010: .*too large.*make room"):
        save(tmp_path, at(10), keep=1)
    assert not list(tmp_path.iterdir())


def test_the_best_stays(tmp_path: Path) -> None:
    for step, loss in ((10, 0.5), (20, 0.2), (30, None), (40, 0.3), (50, None)):
        save(tmp_path, at(step, loss), keep=1)
    assert [one.name for one in folders(tmp_path)] == ["step-00000020", "step-00000050"]
    found = newest(tmp_path)
    assert found is not None and found.step == 50


def test_it_is_saved_as_it_was_while_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, go_on = at(10), threading.Event()

    def held_up(*arguments: Any) -> Path:
        assert go_on.wait(60)  # Who saves in the training's own thread waits for itself.
        return save(*arguments)

    monkeypatch.setattr(ldm.saver, "save", held_up)
    with Saver(tmp_path, keep=1) as saver:
        saver.save(state)
        state.weights["weight"].zero_()
        go_on.set()
    found = newest(tmp_path)
    assert found is not None and torch.equal(found.weights["weight"], at(10).weights["weight"])


def test_an_error_of_saving_is_not_lost(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.write_text("a file where the run's folder belongs")
    mend = pytest.raises(UserError, match=r"step-00000010: .*Not a directory.*; mend that and run")
    with mend, Saver(tmp_path, keep=1) as saver:
        saver.save(at(10))


@pytest.mark.parametrize(
    "name", [*(f"{part}.safetensors" for part in PARTS), "optimizer.pt", "random_states_0.pkl"]
)
def test_nothing_in_a_checkpoint_runs(tmp_path: Path, name: str) -> None:
    """Whoever plants a pickle writes its digest too."""

    class Planted:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    run = tmp_path / "run"
    describe(run, Model({}, {}, "tiny", None))
    folder = save(run, replace(at(10), random=at(10).weights), keep=1)
    (folder / name).write_bytes(pickle.dumps(Planted()))
    state = json.loads((folder / STATE).read_text())
    state["files"][name] = digest_file(folder / name)
    del state[OWN]
    (folder / STATE).write_text(json.dumps(state | {OWN: digest_json(state)}))
    assert damage_of(folder) is None
    refused = pytest.raises(UserError, match=f"{name}: is no safetensors file .*; remove {folder}")
    with refused if name.removesuffix(".safetensors") in PARTS else nullcontext():
        newest(run)
    with refused if name == "ema.safetensors" else nullcontext():
        averaged(folder)
    assert not (tmp_path / "ran").exists()
    pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "ran").exists()


def test_one_that_is_removed_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(tmp_path, Model({}, {}, "tiny", None))
    folder = save(tmp_path, at(10), keep=1)

    def removed_then(one: Path) -> None:
        assert damage_of(one) is None
        (one / "ema.safetensors").unlink()

    monkeypatch.setattr(ldm.checkpoint, "damage_of", removed_then)
    with pytest.raises(UserError, match=f"^{folder}: was removed meanwhile"):
        averaged(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"step": 5},
        lambda state: state | {"val_loss": 0.0},
        lambda state: state | {"averaged": 1},
        lambda state: state | {"files": {}},
        lambda state: {key: one for key, one in state.items() if key != "digest"},
        lambda state: [state],
    ],
)
def test_an_altered_state_does_not_count(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    save(tmp_path, at(10), keep=3)
    folder = save(tmp_path, at(20), keep=3)
    file = folder / "state.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    found = newest(tmp_path)
    assert found is not None and found.step == 10


def test_a_half_written_one_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, at(10), keep=3).rename(tmp_path / ".step-00000010.writing")
    assert newest(tmp_path) is None


def test_the_optimizer_goes_on_as_if_never_stopped() -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 4)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    def step(module: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
        module(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    module, optimizer = make()
    step(module, optimizer)
    other, fresh = make()
    other.load_state_dict(module.state_dict())
    restore_optimizer(fresh, {k: v.clone() for k, v in optimizer_tensors(optimizer).items()})
    step(module, optimizer)
    step(other, fresh)
    assert torch.equal(module.weight, other.weight)


def test_damaged_later_ones_do_not_cost_the_new_one(tmp_path: Path) -> None:
    for step in (200, 300, 400):
        save(tmp_path, at(step), keep=3)
    for step in (300, 400):
        (tmp_path / f"step-{step:08d}" / "weights.safetensors").write_bytes(b"")
    save(tmp_path, at(250), keep=1)
    found = newest(tmp_path)
    assert found is not None and found.step == 250


def test_an_old_one_that_cannot_be_removed_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, at(10), keep=1)
    removed = shutil.rmtree

    def busy(path: Path, **options: Any) -> None:
        if path.name == "step-00000010":
            raise OSError(errno.EBUSY, "Device or resource busy")
        removed(path, **options)

    monkeypatch.setattr(ldm.checkpoint.shutil, "rmtree", busy)
    save(tmp_path, at(20), keep=1)
    assert "step-00000010: an old checkpoint that cannot be removed" in capsys.readouterr().out
    found = newest(tmp_path)
    assert found is not None and found.step == 20


def test_a_disk_that_is_full_at_the_last_file_leaves_nothing_aside(tmp_path: Path) -> None:
    save(tmp_path, at(10), keep=1)
    whole = (tmp_path / "step-00000010" / STATE).stat().st_size
    with room_for(whole - 1), pytest.raises(UserError, match="make room"):
        save(tmp_path, at(20), keep=1)
    assert [one.name for one in tmp_path.iterdir()] == ["step-00000010"]
