"""A training as MLflow shows it: while it goes on, when it is done, when it was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from ldm.artifacts import opening
from ldm.config import FirstStage, Pretrained, Registry, Train
from ldm.first_stage.stage import first_stage
from ldm.images import decode_image
from ldm.live import metrics_of, note_dead
from ldm.tracking import connect, may_exist
from ldm.train import train
from tests import test_first_stage_runs as parts
from tests.launched import SHORT, launch, wait_for
from tests.test_kills import has_done, kill_trainer, terminate


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
    ("way", "code", "workers"),
    [
        (kill_trainer, 137, 0),
        (kill_trainer, 137, 2),
        pytest.param(terminate, 143, 0, marks=pytest.mark.kills),
    ],
)
def test_a_stopped_run_is_seen_as_such_and_goes_on(
    pipeline: Path, latents: Path, tmp_path: Path, store: str, way: object, code: int, workers: int
) -> None:
    """Workers of a trainer that was killed live on for seconds."""
    settings = {**LONG, "experiment": tmp_path.name, "workers": workers}
    process = launch(pipeline, latents, tmp_path, **settings)
    wait_for(partial(has_done, tmp_path, 4), process)
    wait_for(lambda: shown(store, tmp_path), process)
    way(process)  # type: ignore[operator]
    assert process.wait() == code
    (stopped,) = shown(store, tmp_path)
    assert stopped.info.status == "KILLED"
    assert launch(pipeline, latents, tmp_path, **settings).wait() == 0
    (finished,) = shown(store, tmp_path)
    assert finished.info.run_id == stopped.info.run_id and finished.info.status == "FINISHED"


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
            logged = {line["step"]: line[figure] for line in lines if line["part"] == part}
            # What was not yet sent is lost with a process that is killed.
            assert points.items() <= logged.items() and max(points) == steps
    assert len(points) == steps
    for name in ("vae/psnr_db", "vae/discriminator_gradient_norm", "held_out/vae_psnr_db"):
        assert name in run.data.metrics
    assert run.data.metrics["layout/samples_per_second"] > 0
    assert any(name.startswith("system/") for name in run.data.metrics)
    sheets = {item.path for item in client.list_artifacts(run.info.run_id, "reconstructions")}
    assert sheets >= {f"reconstructions/reconstructions{one}.png" for one in ("-00000040", "")}


def test_what_was_not_measured_is_no_metric() -> None:
    line = {"part": "held_out", "step": 0, "clip_order": None, "clip_retrieval": 0.5}
    assert metrics_of(line) == {"held_out/clip_retrieval": 0.5}


def test_a_store_that_is_not_there_stops_nothing(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = Registry(tracking_uri="http://127.0.0.1:9")  # Nobody listens on "discard".
    run_here(pipeline, latents, tmp_path, registry)
    assert "not shown in MLflow from here on" in capsys.readouterr().out
    opening(tmp_path / "model", "model", "train")
