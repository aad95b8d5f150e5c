"""A training as MLflow shows it: while it goes on, when it is done, when it was killed."""

from __future__ import annotations

import json
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import mlflow
import psutil
import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

import ldm.tracking.live
import ldm.tracking.liveness
from ldm.artifacts import opening
from ldm.config import FirstStage, Pretrained, Registry, Train
from ldm.errors import UserError
from ldm.first_stage.stage import first_stage
from ldm.images import decode_image
from ldm.locks import held
from ldm.registry.promotion import promote
from ldm.registry.register import register
from ldm.registry.standing import standing
from ldm.run_log import metrics_of
from ldm.tracking import runs
from ldm.tracking.connection import connect, is_refusal, may_exist
from ldm.tracking.live import Live
from ldm.tracking.liveness import ALIVE, LOCK, RUN_TOKEN, SILENT_S, TOKEN, note_dead
from ldm.train.stage import train
from tests import test_first_stage_runs as parts
from tests import test_registry as registering
from tests.launched import SHORT, launch, wait_for
from tests.test_kills import has_done, kill_all, kill_trainer, terminate


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow database; made once, which takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        connect(uri)
        yield uri


LONG = {"track": True, "steps": 60, "validate_every": 60}
"""Long enough to be seen in MLflow and stopped."""


def shown(uri: str, folder: Path) -> list[Run]:
    """The MLflow runs of the trainings in a folder."""
    if not may_exist(uri):
        return []
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(folder.name)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def run_here(
    pipeline: Path, latents: Path, folder: Path, registry: Registry | None, **settings: object
) -> Path:
    config = Train.model_validate({**SHORT, "mixed_precision": "no", **settings})
    paths = (latents, folder / "model", folder / "runs")
    train(config, Pretrained(pipeline=str(pipeline)), *paths, registry=registry)
    return folder / "model"


def test_figures_sheets_and_the_end(
    pipeline: Path, latents: Path, tmp_path: Path, store: str
) -> None:
    """And none of it moves a byte of the model."""
    registry = Registry(tracking_uri=store, experiment=tmp_path.name)
    model = run_here(pipeline, latents, tmp_path, registry, sample_every=6)
    (run,) = shown(store, tmp_path)
    assert run.info.status == "FINISHED" and run.data.params["learning_rate"] == "0.0004"
    client = mlflow.MlflowClient(store)
    for metric in ("train_loss", "lr", "gradient_norm"):
        history = client.get_metric_history(run.info.run_id, metric)
        assert [point.step for point in history] == [2, 4, 6, 8, 10, 12]
    assert {"val_loss", "val_loss_band_3", "samples_per_second"} <= run.data.metrics.keys()
    assert any(name.startswith("system/") for name in run.data.metrics)
    digest = opening(model, "model", "train").digest
    assert run.data.tags["model_digest"] == digest
    sheets = [item.path for item in client.list_artifacts(run.info.run_id, "samples")]
    assert sheets == ["samples/samples-00000006.png", "samples/samples-00000012.png"]
    drawn = [path.read_bytes() for path in sorted(tmp_path.glob("runs/*/samples-*.png"))]
    assert len(drawn) == 2 and drawn[0] != drawn[1]
    assert decode_image(drawn[0]).std() > 0
    quiet = run_here(pipeline, latents, tmp_path / "quiet", None)
    assert opening(quiet, "model", "train").digest == digest


@pytest.mark.parametrize(
    ("way", "code", "workers", "anew"),
    [
        (kill_trainer, 137, 0, False),
        (kill_trainer, 137, 2, True),
        pytest.param(terminate, 143, 0, True, marks=pytest.mark.kills),
    ],
)
def test_a_stopped_run_is_seen_as_such_and_goes_on(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    store: str,
    way: object,
    code: int,
    workers: int,
    anew: bool,
) -> None:
    """By the command ``anew``, or in this process, which has no start to wait for.

    Workers of a trainer that was killed live on for seconds.
    """
    settings = {**LONG, "experiment": tmp_path.name, "workers": workers}
    process = launch(pipeline, latents, tmp_path, **settings)
    wait_for(partial(has_done, tmp_path, 4), process)
    wait_for(lambda: shown(store, tmp_path), process)
    way(process)  # type: ignore[operator]
    assert process.wait() == code
    (stopped,) = shown(store, tmp_path)
    assert stopped.info.status == "KILLED"
    if anew:
        assert launch(pipeline, latents, tmp_path, **settings).wait() == 0
    else:
        registry = Registry(tracking_uri=store, experiment=tmp_path.name)
        run_here(pipeline, latents, tmp_path, registry, **LONG, checkpoint_every=10)
    (finished,) = shown(store, tmp_path)
    assert finished.info.run_id == stopped.info.run_id and finished.info.status == "FINISHED"


@dataclass(frozen=True)
class Dead:
    """A training that was killed with its launcher; MLflow takes it for running."""

    registry: Registry
    folder: Path

    @property
    def run(self) -> Run:
        runs = shown(self.registry.tracking_uri, self.folder)
        (one,) = (run for run in runs if RUN_TOKEN in run.data.tags)
        return one

    @property
    def status(self) -> str:
        return str(self.run.info.status)

    @property
    def runs(self) -> Path:
        """The folder of its run."""
        (one,) = self.folder.glob("runs/*")
        return one

    def tag(self, name: str, value: object) -> None:
        client = mlflow.MlflowClient(self.registry.tracking_uri)
        client.set_tag(self.run.info.run_id, name, str(value))


@pytest.fixture(scope="module")
def killed(
    pipeline: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory, store: str
) -> Dead:
    folder = tmp_path_factory.mktemp("killed")
    settings = {**LONG, "experiment": folder.name, "workers": 2}
    process = launch(pipeline, latents, folder, **settings)
    wait_for(partial(has_done, folder, 4), process)
    wait_for(lambda: shown(store, folder), process)
    family = psutil.Process(process.pid).children(recursive=True)
    kill_all(process)
    assert process.wait() == -9
    _, alive = psutil.wait_procs(family, timeout=60)  # What is killed still has to die.
    assert len(family) >= 3 and not alive
    return Dead(Registry(tracking_uri=store, experiment=folder.name, model=folder.name), folder)


@pytest.fixture
def dead(killed: Dead) -> Dead:
    """Nobody has looked yet."""
    client = mlflow.MlflowClient(killed.registry.tracking_uri)
    client.update_run(killed.run.info.run_id, status="RUNNING")
    killed.tag(ALIVE, int(time.time()))
    return killed


def look_on_registering(dead: Dead, pipeline: Path, folder: Path) -> None:
    model = registering.model_of(folder, pipeline)
    register(dead.registry, model, registering.evaluation_of(folder, model))


def look_on_promoting(dead: Dead, pipeline: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="nobody: has no challenger"):
        promote(dead.registry.model_copy(update={"model": "nobody"}))


def look_on_reporting(dead: Dead, pipeline: Path, folder: Path) -> None:
    assert standing(dead.registry, "of no model") is None


@pytest.mark.parametrize("look", [look_on_registering, look_on_promoting, look_on_reporting])
def test_whoever_looks_notes_a_run_that_was_killed_with_its_launcher(
    dead: Dead, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable
) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow's files go there.
    look(dead, pipeline, tmp_path)
    assert dead.status == "KILLED"


def test_a_container_that_is_made_anew_sees_the_dead_run_of_the_one_before(
    dead: Dead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "node", lambda: "0123456789ab")
    note_dead(dead.registry)
    assert dead.status == "KILLED"


def test_on_another_machine_only_a_run_that_is_long_silent_is_dead(
    dead: Dead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may be shared, and locks be seen or not."""
    monkeypatch.setattr(ldm.tracking.liveness, "kernel", lambda: "another")
    note_dead(dead.registry)
    assert dead.status == "RUNNING"
    dead.tag(ALIVE, int(time.time()) - SILENT_S - 1)
    with held(dead.runs / LOCK, "nobody holds it"):
        note_dead(dead.registry)
        assert dead.status == "RUNNING"
    note_dead(dead.registry)
    assert dead.status == "KILLED"


def test_a_run_of_which_only_the_path_is_here_is_not_judged_by_its_lock(
    dead: Dead, tmp_path: Path
) -> None:
    """Settings name a folder, so that another disk may have one of that name."""
    token = (dead.runs / TOKEN).read_text()
    try:
        (dead.runs / TOKEN).write_text("of another run")
        note_dead(dead.registry)
        assert dead.status == "RUNNING"
    finally:
        (dead.runs / TOKEN).write_text(token)
    note_dead(dead.registry)
    assert dead.status == "KILLED"


def test_a_run_that_goes_on_elsewhere_is_the_same_in_mlflow(
    dead: Dead, pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another container, which has the same disk in another place."""
    monkeypatch.setattr(platform, "node", lambda: "0123456789ab")
    before = dead.run.info.run_id
    shutil.copytree(dead.folder / "runs", tmp_path / "runs")
    settings = {**LONG, "checkpoint_every": 10, "track": False}
    run_here(pipeline, latents, tmp_path, dead.registry, **settings)
    assert dead.run.info.run_id == before and dead.status == "FINISHED"
    assert dead.run.data.tags["run_folder"] == str(tmp_path / "runs" / dead.runs.name)


def test_a_run_that_was_taken_for_dead_and_lives_says_so(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ldm.tracking.live, "BEAT_S", 0.1)
    registry = Registry(tracking_uri=store, experiment=tmp_path.name)
    with Live(registry, tmp_path, {"batch_size": 8}):
        live = Dead(registry, tmp_path)
        eventually(lambda: shown(store, tmp_path) and live.status == "RUNNING")
        live.tag(ALIVE, 0)
        mlflow.MlflowClient(store).set_terminated(live.run.info.run_id, "KILLED")
        eventually(lambda: live.status == "RUNNING" and live.run.data.tags[ALIVE] != "0")


def test_a_training_has_a_head_start_of_mlflow_until_its_first_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, began = Registry(experiment=tmp_path.name), Event()
    monkeypatch.setattr(Live, "_show", lambda _: began.set())
    with Live(registry, tmp_path, {"batch_size": 8}) as live:
        assert not began.wait(0.5)
        live.write({"step": 1, "loss": 1.0})
        assert began.wait(1)
    began.clear()
    monkeypatch.setattr(ldm.tracking.live, "HEAD_START_S", 0.1)
    with Live(registry, tmp_path, {"batch_size": 8}):  # Its first step may take minutes.
        assert began.wait(1)


def eventually(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_dead_run_that_cannot_be_noted_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    note_dead(Registry(tracking_uri="http://127.0.0.1:9"))
    assert "runs that died are not marked as such" in capsys.readouterr().out


@pytest.mark.slow
def test_a_first_stage_is_shown_part_by_part(
    pipeline: Path, images: Path, tmp_path: Path, store: str
) -> None:
    """Killed once on its way."""
    steps, settings = 80, {"track": True, "experiment": tmp_path.name}
    process = parts.launch(pipeline, images, tmp_path, steps, **settings)
    wait_for(lambda: shown(store, tmp_path), process)
    wait_for(lambda: parts.steps_done(tmp_path) >= 12, process)
    process.kill()
    assert process.wait() == -9
    registry = Registry(tracking_uri=store, experiment=tmp_path.name)
    note_dead(registry)
    (killed,) = shown(store, tmp_path)
    assert killed.info.status == "KILLED"
    config = FirstStage.model_validate(parts.settings(pipeline, steps))
    first_stage(config, images, tmp_path / "out", tmp_path / "runs", registry)
    (run,) = shown(store, tmp_path)
    assert run.info.run_id == killed.info.run_id and run.info.status == "FINISHED"
    made = opening(tmp_path / "out", "first-stage", "first-stage")
    assert run.data.tags["model_digest"] == made.digest
    assert run.data.params["clip.batch_size"] == "4"
    client = mlflow.MlflowClient(store)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    for part in ("vae", "clip", "layout"):
        for figure in ("loss", "lr", "gradient_norm"):
            history = client.get_metric_history(run.info.run_id, f"{part}/{figure}")
            points = {point.step: point.value for point in history}
            own = [line for line in lines if line["part"] == part and figure in line]
            logged = {line["step"]: line[figure] for line in own}
            # What was not yet sent is lost with a process that is killed.
            assert points.items() <= logged.items() and max(points) == steps
    assert len(points) == steps
    for name in (
        "vae/psnr_db",
        "vae/val_psnr_db",
        "vae/discriminator_gradient_norm",
        "held_out/vae_psnr_db",
    ):
        assert name in run.data.metrics
    assert run.data.metrics["layout/samples_per_second"] > 0
    assert any(name.startswith("system/") for name in run.data.metrics)
    sheets = {item.path for item in client.list_artifacts(run.info.run_id, "reconstructions")}
    assert sheets >= {f"reconstructions/reconstructions{one}.png" for one in ("-00000040", "")}


def test_what_was_not_measured_is_no_metric() -> None:
    line = {"part": "held_out", "step": 0, "clip_order": None, "clip_retrieval": 0.5}
    assert metrics_of(line) == {"held_out/clip_retrieval": 0.5}


def test_what_mlflow_does_not_take_is_shown_when_it_answers_again(
    tmp_path: Path,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A sheet that it does not take stops no figure."""
    taken, away = runs.Run.log, iter(range(3))

    def log(self: runs.Run, parameters: dict[str, object], points: runs.Points, *at: int) -> None:
        if points and next(away, None) is not None:
            raise MlflowException("away for a while")
        taken(self, parameters, points, *at)

    monkeypatch.setattr(runs.Run, "log", log)
    monkeypatch.setattr(ldm.tracking.live, "AGAIN_S", 0.05)
    with Live(Registry(tracking_uri=store, experiment=tmp_path.name), tmp_path, {}) as live:
        for step in (1, 2, 3):
            live.write({"step": step, "val_loss": step / 10})
        live.picture(tmp_path / "no such.png")
        live.write({"step": 4, "val_loss": 0.4})
        live.finish("of the model")
    (run,) = shown(store, tmp_path)
    assert run.info.status == "FINISHED" and run.data.tags["model_digest"] == "of the model"
    history = mlflow.MlflowClient(store).get_metric_history(run.info.run_id, "val_loss")
    assert [(point.step, point.value) for point in history] == [
        (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("MLflow does not take the run (away for a while); trying again") == 1
    assert "no such.png: not shown in MLflow" in said


@pytest.mark.parametrize("begun", [False, True], ids=["before it began", "while it goes on"])
def test_a_run_that_mlflow_refuses_goes_on_unseen_and_nobody_waits(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str], begun: bool
) -> None:
    """The experiment is deleted."""
    client = mlflow.MlflowClient(store)
    experiment = client.create_experiment(tmp_path.name)
    if not begun:
        client.delete_experiment(experiment)
    with Live(Registry(tracking_uri=store, experiment=tmp_path.name), tmp_path, {}) as live:
        if begun:
            eventually(lambda: shown(store, tmp_path))
            client.delete_experiment(experiment)
            live.write({"step": 1, "val_loss": 0.1})
        eventually(lambda: not live._thread.is_alive())
        live.write({"step": 2, "val_loss": 0.2})
        live.finish("of the model")
        ends = time.monotonic()
    assert time.monotonic() - ends < 1
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("train: MLflow refuses the run (The ")
    assert said.endswith("Current state is deleted.); it goes on unseen")
    assert not live._tasks  # A long training would fill the memory.


class Answers(BaseHTTPRequestHandler):
    """A server that has one answer for all."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing."""


def as_mlflow(code: str) -> bytes:
    return json.dumps({"error_code": code, "message": "so it is"}).encode()


@pytest.mark.parametrize(
    ("status", "body", "passes"),
    [
        (401, b"who are you?", False),
        (403, as_mlflow("PERMISSION_DENIED"), False),
        (404, as_mlflow("RESOURCE_DOES_NOT_EXIST"), False),
        (400, as_mlflow("INVALID_PARAMETER_VALUE"), False),
        (400, as_mlflow("BAD_REQUEST"), True),
        (404, b"no backend", True),
        (429, as_mlflow("REQUEST_LIMIT_EXCEEDED"), True),
        (500, as_mlflow("INTERNAL_ERROR"), True),
        (503, as_mlflow("TEMPORARILY_UNAVAILABLE"), True),
        (502, b"bad gateway", True),
    ],
)
def test_what_a_server_answers_may_pass_or_not(
    monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, passes: bool
) -> None:
    """On connecting and later."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        server.answer = status, body  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        uri = address(server.socket)
        try:
            with pytest.raises(UserError) as unconnected:
                connect(uri)
            with pytest.raises(MlflowException) as refused:
                mlflow.MlflowClient(uri).get_run("0" * 32)
        finally:
            server.shutdown()
    assert [is_refusal(one.value) for one in (unconnected, refused)] == [not passes] * 2


def test_a_run_keeps_the_settings_that_mlflow_has_of_it(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which it would refuse to change."""
    registry = Registry(tracking_uri=store, experiment=tmp_path.name)
    for number, settings in enumerate(({"seed": 0}, {"seed": 0.5, "steps": 9}), start=1):
        with Live(registry, tmp_path, settings) as live:
            live.write({"step": number, "val_loss": number / 10})
    (run,) = shown(store, tmp_path)
    assert run.data.params == {"seed": "0", "steps": "9"}
    assert run.data.metrics["val_loss"] == 0.2
    assert not capsys.readouterr().out


def test_samples_a_second_are_those_between_two_lines(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(ldm.tracking.live, "time", SimpleNamespace(monotonic=lambda: clock.now))
    registry = Registry(tracking_uri=store, experiment=tmp_path.name)
    with Live(registry, tmp_path, {"batch_size": 8}) as live:
        for clock.now, step in ((1.0, 20), (3.0, 40), (4.0, 45)):
            live.write({"step": step, "loss": 0.5})
        live.write({"step": 45, "val_loss": 0.5})
    (run,) = shown(store, tmp_path)
    history = mlflow.MlflowClient(store).get_metric_history(run.info.run_id, "samples_per_second")
    assert [(point.step, point.value) for point in history] == [(40, 80.0), (45, 40.0)]


def test_a_stop_does_not_wait_for_a_store_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(ldm.tracking.live, "STOPPED_PATIENCE_S", 1)
    begins: list[float] = []
    lives: list[Live] = []

    def stopped(silent: socket.socket) -> None:
        with Live(Registry(tracking_uri=address(silent)), tmp_path, {}) as live:
            lives.append(live)
            silent.accept()
            begins.append(time.monotonic())
            raise SystemExit(143)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(SystemExit):
            stopped(silent)
        assert time.monotonic() - begins[0] < 5
    lives[0]._thread.join(60)  # It says for the whole process where MLflow is.
    assert "did not take all of the run within 1 s" in capsys.readouterr().out


def address(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_store_that_is_not_there_stops_nothing(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(ldm.tracking.live, "PATIENCE_S", 2)
    registry = Registry(tracking_uri="http://127.0.0.1:9")  # Nobody listens on "discard".
    run_here(pipeline, latents, tmp_path, registry)
    said = capsys.readouterr().out
    assert "MLflow does not take the run" in said
    assert "MLflow did not take all of the run within 2 s" in said
    opening(tmp_path / "model", "model", "train")
