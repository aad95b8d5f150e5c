"""MLflow's runs: written, found, gone on with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.config.section import as_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

SYSTEM_METRICS_EVERY_S = 10.0
# What a server takes in one call.
METRICS_A_CALL, PARAMETERS_A_CALL = 1000, 100
Points = dict[tuple[str, int], float]
"""Value by name and step."""


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return int(time.time() * 1000)


@dataclass(frozen=True)
class Run:
    """An MLflow run that is being written."""

    client: MlflowClient
    identity: str

    def log(self, parameters: Mapping[str, Any], points: Points, at_ms: int | None = None) -> None:
        """Write settings, and metrics by name and step, of now or of ``at_ms``.

        Those of the same time are the same, if they are written again.
        """
        from mlflow.entities import Metric, Param

        now = now_ms() if at_ms is None else at_ms
        metrics = [Metric(name, value, now, step) for (name, step), value in points.items()]
        for start in range(0, len(metrics), METRICS_A_CALL):
            self.client.log_batch(self.identity, metrics=metrics[start : start + METRICS_A_CALL])
        settings = [Param(name, as_text(value)) for name, value in parameters.items()]
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
