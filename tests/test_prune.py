"""Trainings that have ended give up their checkpoints, all but the newest; nothing else is lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import pytest

import ldm.checkpoint
from ldm.artifacts import opening, writing
from ldm.checkpoint import aside, best, damage_of, folders, newest, newest_folder, save
from ldm.cli import main
from ldm.config import FirstStage, Pretrained, Registry, Train
from ldm.errors import UserError
from ldm.export import export
from ldm.first_stage.stage import first_stage
from ldm.locks import held, is_held
from ldm.prune import prune
from ldm.run_log import LOG
from ldm.runs import PRUNED, describe, expect_unpruned, origin
from ldm.tracking.connection import connect
from ldm.tracking.live import Live
from ldm.tracking.liveness import LOCK, note_dead
from ldm.train.stage import train
from tests.launched import SHORT
from tests.test_checkpoint import Killed, at, failing
from tests.test_first_stage_runs import settings

NONE = Path("no model")
END = 12
PARTS = ("vae", "clip", "layout")


def training(folder: Path, age: int, steps: Sequence[int] = (6, END), **more: object) -> Path:
    """A run of so many days' age that has these checkpoints and was to take ``END`` steps."""
    config, inputs = {"steps": END, "seed": folder.name}, {"latents": "l", "scaling": "s"}
    describe(folder, {"config": config, "inputs": inputs, "code": [], **more})
    for step in steps:
        save(folder, at(step, float(age)), keep=9)
    return small_files(folder, age)


def staged(folder: Path, age: int, *parts: Sequence[int]) -> Path:
    """A first stage whose parts have these checkpoints."""
    config = {part: {"steps": END} for part in PARTS}
    describe(folder, {"config": config, "inputs": {"images": "i"}, "code": []})
    for part, steps in zip(PARTS, parts, strict=False):
        for step in steps:
            save(folder / part, at(step, float(age)), keep=9)
    return small_files(folder, age)


def small_files(folder: Path, age: int) -> Path:
    for name in (LOG, "model.json", "token", LOCK, "samples-00000006.png"):
        (folder / name).touch()
    when = 1.6e9 - age * 86_400
    for one in (folder / "run.json", *folder.rglob("step-*")):
        os.utime(one, (when, when))
    return folder


def kept(runs: Path) -> list[str]:
    """The runs that have checkpoints, or something aside."""
    having = [one for pattern in ("step-*", ".step-*") for one in runs.rglob(pattern)]
    return sorted({one.relative_to(runs).parts[0] for one in having})


def files(run: Path) -> set[str]:
    return {one.name for one in run.iterdir()}


@pytest.fixture
def five(tmp_path: Path) -> Path:
    """Five runs, ``a`` the newest; ``d`` has not ended."""
    for age, name in enumerate("abcde"):
        training(tmp_path / name, age, (6,) if name == "d" else (6, END))
    return tmp_path


@pytest.mark.parametrize("keep", [0, 1, 2, 4])
def test_the_newest_ended_ones_stay_and_all_that_is_small(
    five: Path, keep: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: files(five / name) for name in "abcde"}
    prune(five, keep, NONE)
    assert kept(five) == sorted(["d", *"abce"[:keep]])
    for name in "abcde":
        gone = {one for one in before[name] if one.startswith("step-")}
        left = before[name] if name in kept(five) else before[name] - gone | {PRUNED}
        assert files(five / name) == left
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(
        f"prune: removed the checkpoints of {4 - keep} of 4 ended trainings, 0.0"
    )
    assert said.endswith(" MB; left as they are: 1 unfinished")
    prune(five, keep, NONE)
    assert f"removed the checkpoints of 0 of {keep} ended" in capsys.readouterr().out


def test_what_would_go_is_named_and_stays(five: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (five / "e" / "step-00000012" / "big").write_bytes(bytes(2_500_000))
    small_files(five / "e", 4)
    before = {one: one.stat().st_mtime_ns for one in five.rglob("*")}
    main(["prune", "--keep", "2", "--runs", str(five), "--dry-run"])
    assert {one: one.stat().st_mtime_ns for one in five.rglob("*")} == before
    *named, said = capsys.readouterr().out.splitlines()
    assert named == [f"{five / 'c'}: 0.0 MB", f"{five / 'e'}: 2.5 MB"]
    assert said.startswith("prune: would remove the checkpoints of 2 of 4 ended trainings, 2.5 MB;")
    main(["prune", "--keep", "2", "--runs", str(five)])
    assert kept(five) == ["a", "b", "d"]


@pytest.mark.parametrize("how", ["begun again", "saved again"])
def test_what_was_at_work_last_is_the_newest(five: Path, how: str) -> None:
    """As a training is that has ended, when its output is to be made once more."""
    if how == "begun again":
        os.utime(five / "e" / "run.json")
    else:
        os.utime(five / "e" / "step-00000012")
    prune(five, 1, NONE)
    assert kept(five) == ["d", "e"]


def test_what_made_the_model_stays(five: Path) -> None:
    config = {"steps": END, "seed": "c"}
    with writing(five / "model", "model", config=config, inputs={"latents": "l"}):
        pass
    prune(five, 1, five / "model")
    assert kept(five) == ["a", "c", "d"]
    prune(five, 0, five / "model")
    assert kept(five) == ["d"]


def test_what_an_unfinished_one_went_on_from_stays(
    five: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own command names that."""
    stands = origin([five / "c" / "step-00000012"])
    training(five / "later", 9, (), **{"from": stands})
    staged(five / "first-stage", 8, (END,), (END,), (END,))
    staged(five / "first-stage-new", 7, (END,), (END,), (END,))
    vae = origin([five / "first-stage" / "vae" / "step-00000012"])
    training(five / "later still", 9, (6,), **{"from": vae})  # Its second part was not learned.
    capsys.readouterr()
    prune(five, 1, NONE)
    assert kept(five) == ["a", "c", "d", "first-stage", "first-stage-new", "later still"]
    said = capsys.readouterr().out
    assert said.endswith("left as they are: 2 unfinished, and what they go on from\n")
    for one in ("later", "later still"):
        shutil.rmtree(five / one)
    prune(five, 1, NONE)
    assert kept(five) == ["a", "d", "first-stage-new"]


def test_trainings_and_first_stages_are_counted_each(five: Path) -> None:
    for age, name in ((20, "x"), (21, "y")):
        staged(five / f"first-stage-{name}", age, (6, END), (END,), (6, END))
    prune(five, 1, NONE)
    assert kept(five) == ["a", "d", "first-stage-x"]
    assert not list((five / "first-stage-y").glob("*/step-*"))
    assert files(five / "first-stage-y") >= {"run.json", "token", PRUNED, *PARTS}


@pytest.mark.parametrize(
    "parts",
    [((END,), (6,)), ((END,), (END,), (6,)), ((END,), (END,)), ((6,), (END,), (END,)), ()],
)
def test_a_first_stage_has_ended_with_its_last_part(
    tmp_path: Path, parts: Sequence[Sequence[int]]
) -> None:
    staged(tmp_path / "first-stage-x", 3, *parts)
    before = files(tmp_path / "first-stage-x")
    prune(tmp_path, 0, NONE)
    assert kept(tmp_path) == (["first-stage-x"] if parts else [])
    assert files(tmp_path / "first-stage-x") == before


def test_a_first_stage_may_have_its_first_parts_from_another(tmp_path: Path) -> None:
    staged(tmp_path / "first-stage-x", 3, (), (), (END,))
    prune(tmp_path, 0, NONE)
    assert not kept(tmp_path)


@pytest.mark.parametrize("damage", ["weights.safetensors", "state.json"])
def test_one_whose_last_checkpoint_is_damaged_has_not_ended(tmp_path: Path, damage: str) -> None:
    run = training(tmp_path / "a", 3)
    (run / "step-00000012" / damage).write_bytes(b"")
    prune(tmp_path, 0, NONE)
    assert len(folders(run)) == 2


def test_one_that_a_process_is_at_is_left_as_it_is(
    five: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(five / "e" / LOCK, "nobody holds it"):
        prune(five, 0, NONE)
    assert kept(five) == ["d", "e"]
    assert "3 of 3 ended" in (said := capsys.readouterr().out) and ": 2 unfinished" in said


@pytest.mark.parametrize("how", ["at work", "at work and away"])
def test_one_that_a_process_comes_to_meanwhile_is_left_as_it_is(
    five: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """While the checkpoints of others are read."""
    reads, lock = damage_of, held(five / "e" / LOCK, "nobody holds it")

    def read(folder: Path) -> str | None:
        if folder.parent.name == "e":
            os.utime(folder.parent / "run.json")
            if how == "at work":
                lock.__enter__()
        return reads(folder)

    monkeypatch.setattr(ldm.checkpoint, "damage_of", read)
    prune(five, 0, NONE)
    assert kept(five) == ["d", "e"] and not (five / "e" / PRUNED).exists()


def test_a_training_that_removes_its_own_meanwhile_is_in_nobodys_way(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, whose locks may not be seen."""

    def then_gone(run: Path) -> list[Path]:
        found = folders(run)
        if run.name == "d":
            shutil.rmtree(five / "d" / "step-00000006", ignore_errors=True)
        return found

    monkeypatch.setattr(ldm.checkpoint, "folders", then_gone)
    prune(five, 0, NONE)
    assert not kept(five) and not (five / "d" / PRUNED).exists()


def test_no_training_begins_where_something_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, removed, seen = training(tmp_path / "a", 3), shutil.rmtree, []

    def look(path: Path, **options: Any) -> None:
        seen.append(is_held(run / LOCK))
        removed(path, **options)

    monkeypatch.setattr(shutil, "rmtree", look)
    prune(tmp_path, 0, NONE)
    assert seen == [True, True] and not is_held(run / LOCK)


def each_kill(make: Callable[[Path], Path], folder: Path) -> Iterator[Path]:
    """The run as it is after a kill at each call into the file system, in a folder of its own."""
    for number in range(200):
        run = make(folder / str(number) / "first-stage-run")
        with failing(number, Killed()) as made, suppress(Killed):
            prune(run.parent, 0, NONE)
        if len(made) <= number:
            assert number > 20
            return
        yield run
    raise AssertionError("never went through")


def run_with_a_leftover(folder: Path) -> Path:
    run = training(folder, 3)
    shutil.copytree(run / "step-00000012", aside(run / "step-00000012"))
    return run


def first_stage_run(folder: Path) -> Path:
    return staged(folder, 3, (6, END), (END,), (6, END))


@pytest.mark.parametrize("make", [run_with_a_leftover, first_stage_run])
def test_killed_anywhere_it_goes_on(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    for run in each_kill(make, tmp_path):
        prune(run.parent, 0, NONE)
        assert not kept(run.parent) and files(run) >= {"run.json", LOG, PRUNED}


@pytest.mark.parametrize("make", [run_with_a_leftover, first_stage_run])
def test_killed_anywhere_it_leaves_what_a_training_can_go_on_from(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    """From all that was learned before, or from nothing: a part learns from those before it."""
    for run in each_kill(make, tmp_path):
        parts = PARTS if make is first_stage_run else ("",)
        steps = [found.step if (found := newest(run / part)) else 0 for part in parts]
        assert set(steps) <= {0, END} and steps == sorted(steps, reverse=True)
        assert not any(damage_of(one) for part in parts for one in folders(run / part))
        if any(steps):
            expect_unpruned(run, "", parts)
        describe(run, {"config": {}, "inputs": {}, "code": []})
        assert not (run / PRUNED).exists()
        for part in parts:
            save(run / part, at(END), keep=1)
            assert damage_of(folders(run / part)[-1]) is None
            assert not list((run / part).glob(".step-*"))


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training(tmp_path / "a", 3)

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    with pytest.raises(
        UserError, match=r"a: its checkpoints cannot be removed \(.*busy.*mend that"
    ):
        prune(tmp_path, 0, NONE)
    assert not is_held(run / LOCK)


@pytest.mark.parametrize(
    ("runs", "keep", "message"),
    [(".", -1, "--keep -1: is no number of"), ("none", 3, "none: no such directory; name the one")],
)
def test_what_is_asked_wrongly(five: Path, runs: str, keep: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune(five / runs, keep, NONE)
    assert kept(five) == [*"abcde"]


def test_a_model_that_is_named_and_not_there_is_no_reason_to_remove_its_training(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["prune", "--keep", "1", "--runs", str(five)]
    with pytest.raises(SystemExit, match="modle: no such model; name the one whose training"):
        main([*command, "--model", str(five / "modle")])
    assert kept(five) == [*"abcde"]
    monkeypatch.chdir(five)  # Where there is none in the usual place, none is meant.
    main(command)
    assert kept(five) != [*"abcde"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": 3, "inputs": {}}'])
def test_what_cannot_be_read_is_left_as_it_is(five: Path, content: str) -> None:
    (five / "e" / "run.json").write_text(content)
    prune(five, 0, NONE)
    assert kept(five) == ["d", "e"]


# Runs of a real training


def test_a_pruned_training_is_trained_anew_by_its_command_and_nobody_takes_it_for_another(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    config = Train.model_validate({**SHORT, "mixed_precision": "no", "sample_every": 6})
    paths = (latents, tmp_path / "model", tmp_path / "runs")
    asked = (config, Pretrained(pipeline=str(pipeline)), *paths)
    train(*asked)
    (run,) = (tmp_path / "runs").iterdir()
    log, made = (run / LOG).read_bytes(), opening(tmp_path / "model", "model", "train")
    prune(tmp_path / "runs", 1, tmp_path / "model")
    assert newest_folder(run) is not None
    prune(tmp_path / "runs", 0, tmp_path / "model")
    assert best(run) is None and (run / LOG).read_bytes() == log
    gone = "has no checkpoints any more, `ldm prune` removed them; "
    for named in (run, run / "step-00000012"):
        with pytest.raises(UserError, match=f"{gone}train again, or name another run$"):
            export(named, tmp_path / "exported")
    more = config.model_copy(update={"steps": 14})
    for settings_now, changed in ((config, False), (more, True)):
        with pytest.raises(UserError, match=f"{gone}leave out --resume to train anew$"):
            train(settings_now, *asked[1:], resume=run, changed=changed)
    shutil.rmtree(tmp_path / "model")
    train(*asked)
    assert [*(tmp_path / "runs").iterdir()] == [run]
    assert (run / LOG).read_bytes() == log and not (run / PRUNED).exists()
    assert opening(tmp_path / "model", "model", "train").files == made.files
    export(run, tmp_path / "exported")


def test_a_pruned_training_is_no_unfinished_one(
    pipeline: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = (latents, tmp_path / "model", tmp_path / "runs")
    for steps in (3, 4):
        config = Train.model_validate({**SHORT, "mixed_precision": "no", "steps": steps})
        train(config, Pretrained(pipeline=str(pipeline)), *paths)
        prune(tmp_path / "runs", 0, NONE)
    assert "--resume" not in capsys.readouterr().out


def test_a_pruned_first_stage_is_trained_anew_by_its_command(
    pipeline: Path, images: Path, tmp_path: Path
) -> None:
    config = FirstStage.model_validate(settings(pipeline, 5))
    asked = (config, images, tmp_path / "out", tmp_path / "runs")
    first_stage(*asked)
    (run,) = (tmp_path / "runs").iterdir()
    made = opening(tmp_path / "out", "first-stage", "first-stage")
    prune(tmp_path / "runs", 1, NONE)
    assert all(newest_folder(run / part) for part in PARTS)
    prune(tmp_path / "runs", 0, NONE)
    assert not kept(tmp_path / "runs")
    with pytest.raises(UserError, match="has no checkpoints any more, `ldm prune` removed them"):
        first_stage(*asked, resume=run)
    first_stage(*asked)
    assert opening(tmp_path / "out", "first-stage", "first-stage").files == made.files


def test_a_pruned_training_is_in_mlflow_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client: mlflow.MlflowClient = connect(uri)
    registry = Registry(tracking_uri=uri, experiment="pruned")
    for name in ("ended", "killed"):
        run = training(tmp_path / "runs" / name, 3)
        (run / "token").unlink()
        with Live(registry, run, {}) as live:
            live.finish("of the model")
    experiment = client.get_experiment_by_name("pruned").experiment_id

    def statuses() -> dict[str, str]:
        found = client.search_runs([experiment])
        return {one.info.run_name: one.info.status for one in found}

    (killed,) = client.search_runs([experiment], "attributes.run_name = 'killed'")
    client.update_run(killed.info.run_id, status="RUNNING")
    prune(tmp_path / "runs", 0, NONE)
    assert statuses() == {"ended": "FINISHED", "killed": "RUNNING"}
    note_dead(registry)
    assert statuses() == {"ended": "FINISHED", "killed": "KILLED"}
