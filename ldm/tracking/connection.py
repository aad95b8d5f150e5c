"""Connecting to MLflow: where it is, and what goes wrong there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import UserError
from ldm.locks import held
from ldm.quiet import quieten

if TYPE_CHECKING:
    from mlflow import MlflowClient as MlflowClient

TRACKING_URI, REGISTRY_URI = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"
SQLITE, MAGIC = "sqlite:///", b"SQLite format 3\0"
SETTINGS = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow's own: 7 retries, the last after two minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
PROBE_TIMEOUT_S = "10"
REFUSALS = frozenset(
    {
        *("INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST"),
        *("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"),
    }
)
"""MLflow's codes for what it would answer once more.

BAD_REQUEST is none: it also says that a database has no connection free. A proxy's plain 404
(ENDPOINT_NOT_FOUND) may be that of a restart.
"""


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
    with _environment_kept(TRACKING_URI), _environment_kept(REGISTRY_URI):
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
    if database is None:
        return
    if database.is_file():
        _expect_sqlite(database)
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


def _expect_sqlite(database: Path) -> None:
    """Refuse what MLflow would ask for a minute and a half, again and again, whether it opens."""
    with database.open("rb") as file:
        if file.read(len(MAGIC)) not in (b"", MAGIC):
            raise UserError(f"{database}: is no SQLite database, or damaged")


def failures() -> tuple[type[Exception], ...]:
    """What MLflow raises when its store does not do as asked, and :func:`connect`."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError, UserError


def is_refusal(error: Exception) -> bool:
    """Whether MLflow would answer the same again, as of a deleted experiment; else it may pass.

    Of what :func:`failures` names.
    """
    cause = error.__cause__ if isinstance(error, UserError) else error
    return getattr(cause, "error_code", None) in REFUSALS


def first_line(error: Exception) -> str:
    """What an error of MLflow's says, without what follows it."""
    return str(error).strip().partition("\n")[0][:200]


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
