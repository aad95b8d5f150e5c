"""MLflow: connecting, versions of a model, runs.

Besides :mod:`ldm.registry`, :mod:`ldm.registered`, and :mod:`ldm.serving` that MLflow itself runs,
nothing imports mlflow.
It is imported late: it reads its settings, telemetry among them, while it is imported.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.locks import held
from ldm.quiet import quieten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun
    from mlflow.entities.model_registry import ModelVersion

TRACKING_URI = "MLFLOW_TRACKING_URI"
SQLITE = "sqlite:///"
PIPELINE = "pipeline"
"""The logged model's artifact that is the pipeline folder."""
MODEL_DIGEST = "model_digest"
"""Tag of a version: the digest of its pipeline folder's manifest."""

SETTINGS = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow's own: 7 retries, the last after two minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
PROBE_TIMEOUT_S = "10"
SYSTEM_METRICS_EVERY_S = 10.0
# What a server takes in one call.
METRICS_A_CALL, PARAMETERS_A_CALL = 1000, 100
Points = dict[tuple[str, int], float]
"""Value by name and step."""
Metrics = dict[str, float]


def tracking_uri(configured: str) -> str:
    """The URI to use: ``MLFLOW_TRACKING_URI`` where it is set, else the configured one."""
    return os.environ.get(TRACKING_URI) or configured


def may_exist(uri: str) -> bool:
    """False for a database that is not there: connecting would make it."""
    database = _database(uri)
    return database is None or database.is_file()


def connect(uri: str) -> MlflowClient:
    """A client of the tracking server and registry at ``uri``, which this process then uses.

    A relative sqlite path is taken from the working directory and made absolute; a database that is
    not there is made. Raises :class:`UserError` when nothing answers there.
    """
    quieten()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    # The environment says nothing to an MLflow that was imported before.
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    absolute = _absolute(uri)
    with _environment_kept(TRACKING_URI):
        mlflow.set_tracking_uri(absolute)
    mlflow.set_registry_uri(absolute)
    try:
        _make_database(absolute)
        client = mlflow.MlflowClient()
        with _environment_kept("MLFLOW_HTTP_REQUEST_TIMEOUT"):
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", PROBE_TIMEOUT_S)
            client.search_experiments(max_results=1)
    except failures() as error:
        raise UserError(
            f"{uri}: MLflow cannot be reached ({first_line(error)}); start its server, or change "
            f"registry.tracking_uri or {TRACKING_URI}"
        ) from error
    return client


def _make_database(uri: str) -> None:
    """Make an sqlite database with MLflow's tables, if there is none; whole or not at all.

    MLflow's own way, table by table in place, fails if two processes take it at a time, and what is
    left of one that was killed is never mended.
    """
    import mlflow

    database = _database(uri)
    if database is None or database.is_file():
        return
    refusal = f"{database}: another process is making it; wait for it, or stop it"
    with held(database.with_name(f"{database.name}.lock"), refusal, patience_s=60):
        if database.is_file():
            return
        fresh = database.with_name(f"{database.name}.new")
        for leftover in (fresh, fresh.with_name(f"{fresh.name}-journal")):
            leftover.unlink(missing_ok=True)
        mlflow.MlflowClient(f"{SQLITE}{fresh}").search_experiments(max_results=1)
        if not database.is_file():
            fresh.rename(database)


def aliases(client: MlflowClient, name: str) -> dict[str, str]:
    """Alias to version of a registered model; empty when there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return {alias: str(version) for alias, version in found.items()}


def version_of(client: MlflowClient, name: str, version: str) -> tuple[ModelVersion, Metrics]:
    """A version of a registered model and the last metrics of its run.

    Raises :class:`UserError` when there is no such version.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(name, version)
    except MlflowException as error:
        raise UserError(f"{name}: has no version {version!r}; `mlflow ui` shows them") from error
    return found, client.get_run(found.run_id).data.metrics


def find_version(client: MlflowClient, name: str, tags: Mapping[str, str]) -> ModelVersion | None:
    """The newest version of a registered model that has all of these tags."""
    wanted = [f"name = '{name}'", *(f"tags.{key} = '{value}'" for key, value in tags.items())]
    found = client.search_model_versions(" and ".join(wanted))
    return max(found, key=lambda version: int(version.version), default=None)


@dataclass(frozen=True)
class Run:
    """An MLflow run that is being written."""

    client: MlflowClient
    identity: str

    def log(self, parameters: Mapping[str, Any], points: Points) -> None:
        """Write settings, and metrics by name and step."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for (name, step), value in points.items()]
        for start in range(0, len(metrics), METRICS_A_CALL):
            self.client.log_batch(self.identity, metrics=metrics[start : start + METRICS_A_CALL])
        settings = [
            Param(name, value if isinstance(value, str) else json.dumps(value))
            for name, value in parameters.items()
        ]
        for start in range(0, len(settings), PARAMETERS_A_CALL):
            self.client.log_batch(self.identity, params=settings[start : start + PARAMETERS_A_CALL])

    def lives(self, tags: Mapping[str, str]) -> None:
        """Write tags; the run is running, whatever it was."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.identity, tags=[RunTag(*tag) for tag in tags.items()])
        self.client.update_run(self.identity, status="RUNNING")

    def name_version(self, name: str, source: str, tags: Mapping[str, str], about: str) -> str:
        """Make a model that was logged in this run a version of the registered model."""
        if not self.client.search_registered_models(f"name = '{name}'"):
            self.client.create_registered_model(name)
        made = self.client.create_model_version(
            *(name, source, self.identity),
            tags=dict(tags),
            description=about,
            # A server refuses a logged model's URI without it.
            model_id=source.removeprefix("models:/"),
        )
        return str(made.version)


@contextmanager
def writing_run(
    client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str], known: str | None
) -> Iterator[Run]:
    """A run of ``experiment``, new or ``known``; finished with the block, failed if that raises."""
    import mlflow

    identity = experiment_id(client, experiment)
    new = {"experiment_id": identity, "run_name": name, "tags": dict(tags)}
    with mlflow.start_run(run_id=known) if known else mlflow.start_run(**new) as run:
        if known:
            mlflow.set_tags(dict(tags))
        yield Run(client, run.info.run_id)


def experiment_id(client: MlflowClient, experiment: str) -> str:
    """Of that name; made if there is none."""
    known = client.get_experiment_by_name(experiment)
    return str(known.experiment_id if known else client.create_experiment(experiment))


def runs_of(client: MlflowClient, experiment: str, wanted: str) -> list[MlflowRun]:
    """An experiment's runs that a filter lets through, in MLflow's language; the newest first."""
    known = client.get_experiment_by_name(experiment)
    return list(client.search_runs([known.experiment_id], wanted)) if known else []


def continue_run(
    client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str], same: str
) -> Run:
    """The newest run whose tag ``same`` is that of ``tags``, or a new one; running, with all."""
    for known in runs_of(client, experiment, f"tags.{same} = '{tags[same]}'"):
        run = Run(client, known.info.run_id)
        run.lives(tags)
        return run
    made = client.create_run(experiment_id(client, experiment), tags=dict(tags), run_name=name)
    return Run(client, made.info.run_id)


@contextmanager
def system_metrics(run: Run) -> Iterator[None]:
    """Log what the machine does (CPU, memory, disk, network, GPUs) to a run, now and then.

    And once at the end, so that a short run says something too.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run.identity, SYSTEM_METRICS_EVERY_S, resume_logging=True)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
        monitor.collect_metrics()
        monitor.publish_metrics(monitor.aggregate_metrics())
        monitor.mlflow_logger.flush()


def failures() -> tuple[type[Exception], ...]:
    """What MLflow raises when its store does not do as asked, and :func:`connect`."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError, UserError


def code_commit() -> str | None:
    """The commit checked out here, with ``-dirty`` after changes; none outside git.

    ``dvc.lock`` and ``*.dvc`` name data and results, which have digests of their own.
    """
    code = ["--", ":/", ":(exclude,top)dvc.lock", ":(exclude,glob)**/*.dvc"]
    try:
        head = _git("rev-parse", "--verify", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", *code)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _database(uri: str) -> Path | None:
    """The file of an sqlite database; None for what is none."""
    path = uri.removeprefix(SQLITE)
    return None if path in (uri, ":memory:") else Path(path)


def _absolute(uri: str) -> str:
    database = _database(uri)
    return f"{SQLITE}{database.absolute()}" if database else uri


@contextmanager
def _environment_kept(name: str) -> Iterator[None]:
    """Put a variable back afterwards. MLflow sets its own, and would outlive a configuration."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def first_line(error: Exception) -> str:
    """What an error of MLflow's says, without what follows it."""
    return str(error).strip().partition("\n")[0][:200]
