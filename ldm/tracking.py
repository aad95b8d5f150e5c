"""MLflow's side of the registry: connecting, and pipeline folders in and out of it.

Besides :mod:`ldm.registry`, and :mod:`ldm.serving` that MLflow itself runs, nothing imports mlflow.
It is imported late: it reads its settings, telemetry among them, while it is imported.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ldm.artifacts import opening
from ldm.config import Registry
from ldm.errors import UserError
from ldm.quiet import quieten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

TRACKING_URI = "MLFLOW_TRACKING_URI"
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
# What a server takes in one call.
METRICS_A_CALL, PARAMETERS_A_CALL = 1000, 100
Points = dict[tuple[str, int], float]
"""Value by name and step."""
Metrics = dict[str, float]


def tracking_uri(configured: str) -> str:
    """The URI to use: ``MLFLOW_TRACKING_URI`` where it is set, else the configured one."""
    return os.environ.get(TRACKING_URI) or configured


def connect(uri: str) -> MlflowClient:
    """A client of the tracking server and registry at ``uri``, which this process then uses.

    A relative sqlite path is taken from the working directory and made absolute. Raises
    :class:`UserError` when nothing answers there.
    """
    quieten()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # The environment says nothing to an MLflow that was imported before.
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    absolute = _absolute(uri)
    with _environment_kept(TRACKING_URI):
        mlflow.set_tracking_uri(absolute)
    mlflow.set_registry_uri(absolute)
    try:
        client = mlflow.MlflowClient()
        with _environment_kept("MLFLOW_HTTP_REQUEST_TIMEOUT"):
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", PROBE_TIMEOUT_S)
            client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(
            f"{uri}: MLflow cannot be reached ({_first_line(error)}); start its server, or change "
            f"registry.tracking_uri or {TRACKING_URI}"
        ) from error
    return client


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


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings or metrics with dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
    client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str]
) -> Iterator[Run]:
    """A new run of ``experiment``: finished when the block ends, failed when it raises."""
    import mlflow

    known = client.get_experiment_by_name(experiment)
    identity = known.experiment_id if known else client.create_experiment(experiment)
    with mlflow.start_run(experiment_id=identity, run_name=name, tags=dict(tags)) as run:
        yield Run(client, run.info.run_id)


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


def fetch_model(uri: str) -> Path:
    """The pipeline folder of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    The registry is that of ``MLFLOW_TRACKING_URI``, by default the configuration's. A store on this
    machine is read in place; from others the folder is fetched once, into ``ldm/models`` of the
    user's cache. Raises :class:`UserError` when there is no such model or it is damaged.
    """
    client, name, version = _version_behind(uri)
    return _folder_of(client, uri, name, version)


def pinned(uri: str) -> str:
    """``models:/NAME/VERSION`` for ``models:/NAME@ALIAS``: aliases move. Raises as above."""
    _, name, version = _version_behind(uri)
    return f"models:/{name}/{version}"


def _version_behind(uri: str) -> tuple[MlflowClient, str, str]:
    at = tracking_uri(Registry().tracking_uri)
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if not match:
        raise UserError(f"{uri}: is no model; write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = match.groups()
    database = at.removeprefix("sqlite:///")
    if database != at and not Path(database).is_file():
        raise UserError(
            f"{uri}: {database} does not exist; run `ldm register`, or set {TRACKING_URI}"
        )
    client = connect(at)
    version = version or aliases(client, name).get(alias)
    if not version:
        raise UserError(f"{uri}: {at} has no such model; run `ldm register` and `ldm promote`")
    return client, name, version


def _folder_of(client: MlflowClient, uri: str, name: str, version: str) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        digest = client.get_model_version(name, version).tags.get(MODEL_DIGEST)
        store = client.get_model_version_download_uri(name, version).rstrip("/")
        if digest is None:
            raise UserError(f"{uri}: was not registered by `ldm register`; name another version")
        cached = _cache() / digest
        if cached.is_dir():
            return _verified(cached, digest, uri)
        flavor = Model.load(store).flavors["python_function"]
        source = f"{store}/{flavor['artifacts'][PIPELINE]['path']}"
        if _is_here(source):
            # Without a destination MLflow answers with the place itself.
            return _verified(Path(download_artifacts(artifact_uri=source)), digest, uri)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as aside:
            fetched = Path(download_artifacts(artifact_uri=source, dst_path=aside))
            _verified(fetched, digest, uri)
            if not cached.is_dir():
                fetched.rename(cached)
    except (MlflowException, OSError) as error:
        raise UserError(
            f"{uri}: cannot be fetched ({_first_line(error)}); register it again"
        ) from error
    return cached


@lru_cache
def _verified(folder: Path, digest: str, uri: str) -> Path:
    """``folder`` if it holds what was registered; read once a process."""
    if opening(folder, "model", "register").digest != digest:
        raise UserError(f"{folder}: is not what {uri} was registered with; register it again")
    return folder


def _is_here(uri: str) -> bool:
    return urlsplit(uri).scheme in ("", "file")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "models"


def _absolute(uri: str) -> str:
    path = uri.removeprefix("sqlite:///")
    if path == uri or path == ":memory:":
        return uri
    return f"sqlite:///{Path(path).absolute()}"


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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
