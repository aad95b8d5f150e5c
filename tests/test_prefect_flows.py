"""The Prefect flows' own part: what they run, what ends it, and when nothing is to be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import ItemsView
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.exceptions import ParameterTypeError
from prefect.logging import disable_run_logger

import flows.retrain
from flows import process
from flows.generate import generate
from flows.process import run
from flows.retrain import reported, retrain
from ldm.artifacts import opening, write_json, writing
from tests.launched import wait_for
from tests.test_prune import kept, training

ROOT = Path(__file__).resolve().parent.parent


# What ends a stage


class Cancelled(BaseException):
    """As Prefect's: no Exception."""


def run_and_cancel(script: str, command: list[str], folder: Path) -> None:
    """Cancel when ``script.py`` says that it is ready."""

    def log(line: str) -> None:
        if line == "ready":
            raise Cancelled

    (folder / "script.py").write_text(textwrap.dedent(script))
    with pytest.raises(Cancelled):
        run(command, folder, log)


def test_a_cancelled_stage_may_stop_in_good_order(tmp_path: Path) -> None:
    """It outlives what started it, as a training does DVC, and may say so."""
    script = """
        import pathlib, signal, sys, time

        def stop(*_):
            time.sleep(0.5)
            print("stopped", flush=True)
            pathlib.Path("stopped").touch()
            sys.exit()

        signal.signal(signal.SIGTERM, stop)
        print("ready", flush=True)
        time.sleep(60)
    """
    run_and_cancel(script, ["bash", "-c", f"{sys.executable} script.py & wait"], tmp_path)
    assert (tmp_path / "stopped").exists()


def test_a_cancelled_stage_that_does_not_stop_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "PATIENCE_S", 0.5)
    script = """
        import os, pathlib, signal, time

        pathlib.Path("pid").write_text(str(os.getpid()))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        time.sleep(60)
    """
    run_and_cancel(script, [sys.executable, "script.py"], tmp_path)
    with pytest.raises(ProcessLookupError):  # A zombie would be found.
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
def test_a_cancelled_retraining_ends_its_stage(tmp_path: Path) -> None:
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    command = "trap 'touch stopped; exit 1' TERM; touch started; sleep 60 & wait"
    write_json(tmp_path / "dvc.yaml", {"stages": {"ingest": {"cmd": command}}})  # JSON is YAML.
    code = """
from pathlib import Path
from flows.process import stop_in_order
from flows.retrain import retrain
stop_in_order()
retrain(Path.cwd())
"""
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT)}
    flow = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    try:
        wait_for((tmp_path / "started").exists, flow)
        flow.terminate()
        flow.wait(30)
    finally:
        flow.kill()
    assert (tmp_path / "stopped").exists()
    assert flow.returncode == 143
    ours = ("PREFECT_HOME", environment["PREFECT_HOME"])
    left = [one for one in psutil.process_iter() if ours in environment_of(one)]
    assert not psutil.wait_procs(left, timeout=20)[1]  # Prefect's temporary server.


def environment_of(process: psutil.Process) -> ItemsView[str, str]:
    try:
        return process.environ().items()
    except psutil.Error:
        return {}.items()


# What is run


@pytest.mark.parametrize("name", ["retrain", "promote", "generate"])
def test_help_starts_nothing(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"flows.{name}", "--help"],
        cwd=ROOT,
        env={**os.environ, "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage:")


TOLD = {"steps": 1, "guidance": 3.0, "sampler": "euler", "height": 32, "width": 96}
MORE = {"num_images": 2, "negative": "blue", "fast": True, "rows_per_shard": 5}
JOBS: dict[str, dict[str, Any]] = {"nothing": {}, "a seed": {"seed": 0}, "much": {**TOLD, **MORE}}
"""What a job is told, by the name of its folder."""


@pytest.fixture(scope="module")
def jobs(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Where the jobs are done, and what each says; they start for seconds, so all at a time."""
    root = tmp_path_factory.mktemp("jobs")
    write_json(root / "params.yaml", {"generate": {"seed": 7, "steps": 2}})
    (root / "prompts.txt").write_text("a red circle\n")

    def job(name: str) -> str:
        return generate.fn("prompts.txt", name, str(pipeline), **JOBS[name], root=root)

    with disable_run_logger(), ThreadPoolExecutor() as pool:
        return root, dict(zip(JOBS, pool.map(job, JOBS), strict=True))


@pytest.mark.parametrize(("name", "seed"), [("nothing", 7), ("a seed", 0)])
def test_what_generate_is_not_told_params_yaml_says(
    jobs: tuple[Path, dict[str, str]], name: str, seed: int
) -> None:
    root, said = jobs
    assert said[name] == f"generate: 1 pictures -> {name}"
    assert json.loads((root / name / "job.json").read_text())["seed"] == seed


def test_what_generate_is_told_reaches_the_job(jobs: tuple[Path, dict[str, str]]) -> None:
    root, said = jobs
    assert said["much"] == "generate: 2 pictures -> much"
    made = [json.loads(line) for line in (root / "much" / "images.jsonl").open()]
    for one in made:
        assert TOLD.items() <= one.items() and one["negative"] == "blue"
        assert one["guided_to"] < 1
    assert list((root / "much").glob("*.tar"))


def test_how_many_runs_to_keep_is_checked_before_anything_is_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.retrain", "--keep-runs", "-1"]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "--keep-runs -1: give 0 or more" in done.stderr
    with pytest.raises(ParameterTypeError, match="keep_runs: Input should be greater"):
        retrain.validate_parameters({"root": tmp_path, "ingest_retries": 0, "keep_runs": -1})


@pytest.mark.parametrize("told", [{}, {"keep_runs": 1}])
def test_runs_are_pruned_at_the_end_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, int]
) -> None:
    """The chain's tests run the other steps too."""
    (tmp_path / "params.yaml").touch()
    for age, name in enumerate("ab"):
        training(tmp_path / "runs" / name, age)
    left: list[list[str]] = []
    command = flows.retrain.command

    def step(name: str, root: Path, *options: list[str]) -> str:
        with disable_run_logger():
            return command.fn(name, root, *options) if name == "prune" else name

    monkeypatch.setattr(flows.retrain, "stage_graph", lambda root: {})
    monkeypatch.setattr(flows.retrain, "command", step)
    monkeypatch.setattr(flows.retrain, "_leave_artifacts", lambda *about: left.append(about[-1]))
    retrain.fn(tmp_path, **told)
    (said,) = left
    assert said[:3] == ["register", "promote", "report"] and len(said) == 3 + len(told)
    assert kept(tmp_path / "runs") == (["a"] if told else ["a", "b"])
    assert not told or said[3].startswith("prune: removed the checkpoints of 1 of 2 ended")


# When nothing is to be done


def test_reported_is_what_the_page_is_about(tmp_path: Path) -> None:
    """A page of the training before means that what follows the evaluation has failed."""

    def evaluate(model: str, metrics: str) -> None:
        inputs = {"model": model, "prompts": "p", "clip": "c"}
        with writing(tmp_path / "artifacts/eval", "eval", config={}, inputs=inputs) as fresh:
            (fresh / "metrics.json").write_text(metrics)

    def report(model: str) -> None:
        judged = opening(tmp_path / "artifacts/eval", "eval", "evaluate").digest
        inputs = {"images": "i", "latents": "l", "model": model, "eval": judged}
        with writing(tmp_path / "artifacts/report", "report", config={}, inputs=inputs) as fresh:
            (fresh / "index.html").touch()

    assert not reported(tmp_path)
    evaluate("first", "good")
    assert not reported(tmp_path)
    report("first")
    assert reported(tmp_path)
    evaluate("first", "better")
    assert not reported(tmp_path)
    report("first")
    evaluate("second", "better")
    assert not reported(tmp_path)
    report("second")
    assert reported(tmp_path)
