"""The whole chain on a few dozen pairs, in the ways its users run it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.dag import stage_graph

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SMALL = {
    "scenes": {"rows": 48, "validation_rows": 16, "prompts": 4},
    "train": {"steps": 6, "batch_size": 8, "warmup_steps": 1, "validate_every": 3},
    "evaluate": {"sampling": {"steps": 2}},
}


def environment(project: Path) -> dict[str, str]:
    """A user's, so on as many threads as there are cores; they wait for each other asleep.

    Awake they keep the cores from those who compute, where two projects are made at a time.
    """
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {
        **own,
        "OMP_WAIT_POLICY": "passive",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "PREFECT_HOME": str(project / ".prefect"),
    }


def call(project: Path, *command: str, **changes: str) -> str:
    done = subprocess.run(
        command,
        cwd=project,
        env={**environment(project), **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def make_project(folder: Path) -> Path:
    """This project with small settings, as a repository of its own, its lists written."""
    folder.mkdir()
    for name in ("flows", "ldm", "infra"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "prefect.yaml", ".dvcignore", ".gitignore"):
        shutil.copyfile(ROOT / name, folder / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in SMALL.items():
        for key, value in values.items():
            old = params[section].get(key)
            params[section][key] = {**old, **value} if isinstance(old, dict) else value
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    call(folder, "git", "init", "-q")
    call(folder, "dvc", "init", "-q")
    call(folder, "ldm", "scenes")
    return folder


def call_all(project: Path, *commands: list[str], **changes: str) -> list[str]:
    """What each says; they run at the same time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda command: call(project, *command, **changes), commands))


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that DVC has made and one that the flow has, at the same time."""
    ways = {"dvc": ["dvc", "repro"], "flow": [sys.executable, "-m", "flows.retrain"]}

    def made(name: str) -> Path:
        project = make_project(tmp_path_factory.mktemp(name) / "project")
        call(project, *ways[name])
        return project

    with ThreadPoolExecutor() as pool:
        return dict(zip(ways, pool.map(made, ways), strict=True))


@pytest.fixture(scope="module")
def reproduced(projects: dict[str, Path]) -> Path:
    return projects["dvc"]


@pytest.fixture(scope="module")
def retrained(projects: dict[str, Path]) -> Path:
    return projects["flow"]


def test_the_flow_has_dvcs_graph() -> None:
    graph = stage_graph(ROOT)
    assert graph == {
        "ingest": (),
        "encode": ("ingest",),
        "train": ("encode",),
        "evaluate": ("train",),
    }
    shown = call(ROOT, "dvc", "dag", "--dot")
    for stage, needed in graph.items():
        for other in needed:
            assert f'"{other}" -> "{stage}"' in shown


def test_repro_and_flow_write_the_same_lock(reproduced: Path, retrained: Path) -> None:
    assert (reproduced / "dvc.lock").read_bytes() == (retrained / "dvc.lock").read_bytes()


def test_dvc_deletes_the_latents_and_they_are_not_encoded_again(
    reproduced: Path, tmp_path: Path
) -> None:
    project = shutil.copytree(reproduced, tmp_path / "project")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["encode"]["text_shards"] = 3
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    said = call(project, "dvc", "repro", "-s", "encode")
    assert said.count("(0 encoded, the rest reused)") == 2
    assert len(list((project / "artifacts/latents").glob("texts-*.tar"))) == 3


def test_dvc_deletes_the_pictures_and_they_are_not_fetched_again(
    reproduced: Path, tmp_path: Path
) -> None:
    project = shutil.copytree(reproduced, tmp_path / "project")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["ingest"]["samples_per_shard"] = 7
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    assert ", 0 URLs asked" in call(project, "dvc", "repro", "-s", "ingest")
    assert len(list((project / "artifacts/images").glob("train-*.tar"))) > 6


def test_the_metrics_are_all_there(reproduced: Path) -> None:
    metrics = json.loads((reproduced / "artifacts/eval/metrics.json").read_text())
    shares = ("adherence", "adherence_new", "adherence_heldout")
    for values in (metrics, metrics["start"]):
        assert all(0 <= values[name] <= 1 for name in shares)
        assert 0 <= values["clip_score"] <= 100
    assert metrics["val_loss"] > 0
    assert (reproduced / "artifacts/eval/samples.png").stat().st_size > 10_000


def test_a_champion_draws_in_a_fresh_process(retrained: Path) -> None:
    code = (
        "import mlflow; "
        "model = mlflow.pyfunc.load_model('models:/ldm@champion'); "
        "picture = model.predict(['a red circle on a grey background'])[0]; "
        "print(picture[:8] == b'\\x89PNG\\r\\n\\x1a\\n')"
    )
    assert call(retrained, sys.executable, "-c", code).strip().endswith("True")


def test_generate_draws_a_prompt_and_a_file_with_the_champion(retrained: Path) -> None:
    (retrained / "prompts.txt").write_text("a red circle\n两个蓝色方形\n")
    command = ["ldm", "generate", "--seed", "5"]
    one = [*command, "--prompt", "a red circle", "--out", "one"]
    call_all(retrained, one, [*command, "--prompts", "prompts.txt", "--out", "two"])
    assert [path.name for path in (retrained / "one").glob("*.png")] == ["00000.png"]
    assert len(list((retrained / "two").glob("*.png"))) == 2
    one, two = ((retrained / name / "00000.png").read_bytes() for name in ("one", "two"))
    assert one == two


def test_an_unchanged_project_is_left_alone(retrained: Path) -> None:
    before = (retrained / "dvc.lock").read_bytes()
    started = time.monotonic()
    said = call(retrained, sys.executable, "-m", "flows.retrain")
    assert "every stage is up to date" in said
    assert time.monotonic() - started < 20
    assert (retrained / "dvc.lock").read_bytes() == before
    assert call(retrained, "dvc", "status").strip().endswith("Data and pipelines are up to date.")


def test_after_a_new_evaluation_what_follows_it_is_done(retrained: Path, tmp_path: Path) -> None:
    """As after a retraining whose registering failed: DVC is clean, the page is the former one."""
    project = shutil.copytree(retrained, tmp_path / "project")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["evaluate"]["sampling"]["seed"] = 1
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    call(project, "dvc", "repro")
    said = call(project, sys.executable, "-m", "flows.retrain")
    assert "-> ldm version 2, challenger" in said
    assert "every stage is up to date" in call(project, sys.executable, "-m", "flows.retrain")


def test_the_page_is_there(retrained: Path) -> None:
    page = (retrained / "artifacts/report/index.html").read_text()
    assert "data:image/" in page and "http://" not in page.split("<body", 1)[0]


PREFECT = str(BIN / "prefect")
WORKER = [PREFECT, "worker", "start", "--pool", "ldm", "--run-once"]


@pytest.fixture(scope="module")
def server(retrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prefect server on loopback, with a work pool."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    process = subprocess.Popen(
        [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env={**environment(retrained), "PREFECT_HOME": str(tmp_path_factory.mktemp("server"))},
        cwd=retrained,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
        create = [PREFECT, "work-pool", "create", "ldm", "--type", "process"]
        call(retrained, *create, PREFECT_API_URL=url)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def test_a_flow_takes_options(retrained: Path, server: str) -> None:
    options = {
        "ldm: has no version '9'": ["--version", "9"],
        "ldm: has no former champion": ["--rollback"],
    }
    started = {
        answer: subprocess.Popen(
            [sys.executable, "-m", "flows.promote", *asked],
            cwd=retrained,
            env={**environment(retrained), "PREFECT_API_URL": server},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for answer, asked in options.items()
    }
    for answer, process in started.items():
        assert answer in process.communicate(timeout=400)[0]


def test_a_server_accepts_and_runs_the_deployments(retrained: Path, server: str) -> None:
    api = {"PREFECT_API_URL": server}
    before = {run["id"] for run in asked_of(server, "flow_runs")}
    call(retrained, PREFECT, "--no-prompt", "deploy", "--all", **api, LDM_ROOT=str(retrained))
    run = [PREFECT, "deployment", "run"]
    prompts = ["--param", "prompts=data/prompts.jsonl"]
    asked = ["retrain/nightly"], ["promote/promote"], ["generate/generate", *prompts]
    call_all(retrained, *([*run, *one] for one in asked), **api)
    call(retrained, *WORKER, **api)
    runs = [run for run in asked_of(server, "flow_runs") if run["deployment_id"]]
    new = [run for run in runs if run["id"] not in before]
    # The nightly schedule has put later runs into the calendar.
    due = {run["name"]: run["state_name"] for run in new if run["state_name"] != "Scheduled"}
    assert list(due.values()) == ["Completed"] * 3, due
    assert len(list((retrained / "generated").glob("*/*.png"))) == 12
    (page,) = (one for one in asked_of(server, "artifacts") if one["key"] == "retraining")
    assert "- prune: removed the checkpoints of 0 of 1 ended trainings, 0.0 MB;" in page["data"]


def asked_of(server: str, kind: str) -> list[dict[str, Any]]:
    """All that a server has of a kind."""
    about = {"content-type": "application/json"}
    request = urllib.request.Request(f"{server}/{kind}/filter", b"{}", about)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return list(json.load(answer))


def test_a_worker_runs_in_its_own_checkout(retrained: Path, server: str, tmp_path: Path) -> None:
    """Deployed by another one, without ``LDM_ROOT``."""
    api = {"PREFECT_API_URL": server}
    other = shutil.copytree(retrained, tmp_path / "other")
    (other / "prompts.txt").write_text("a red circle\n")
    call(retrained, PREFECT, "--no-prompt", "deploy", "--all", **api)
    asked = ["--param", "prompts=prompts.txt", "--param", "out=drawn"]
    call(retrained, PREFECT, "deployment", "run", "generate/generate", *asked, **api)
    call(other, *WORKER, **api, LDM_ROOT=str(other))
    assert [path.name for path in (other / "drawn").glob("*.png")] == ["00000.png"]
