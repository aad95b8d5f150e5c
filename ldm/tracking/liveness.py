"""Which trainings live: what a run tells of itself, and finding those that died.

A run that was killed cannot say so itself: whoever looks next finds its lock free, or that it has
been silent for long, and notes it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from ldm.artifacts import write_whole
from ldm.config import Registry
from ldm.locks import is_held, kernel
from ldm.progress import say
from ldm.tracking import connection, runs

if TYPE_CHECKING:
    from ldm.tracking.connection import MlflowClient

LOCK = "lock"
"""In a run's folder: held as long as the training lives."""
TOKEN = "token"
"""In a run's folder: what no other has. It tells the run, wherever the folder is mounted."""
FOLDER, RUN_TOKEN, KERNEL, HOST = "run_folder", "run_token", "kernel", "host"
"""Tags of a run; the host's name is for people."""
ALIVE = "alive_at"
"""Tag of a run: when it last said that it lives, in seconds since 1970."""
SILENT_S = 1800
"""After how long without that it is taken for dead."""


def life_tags(run: Path) -> dict[str, str]:
    """What tells the run with this folder, and that it lives."""
    tags = {FOLDER: str(run), RUN_TOKEN: _token(run), KERNEL: kernel()}
    return tags | {HOST: platform.node(), ALIVE: str(int(time.time()))}


def _token(run: Path) -> str:
    """The token in a run's folder, made if there is none."""
    file = run / TOKEN
    if not file.is_file():
        write_whole(file, uuid4().hex.encode())
    return file.read_text()


def connected(registry: Registry) -> MlflowClient:
    """A client; trainings that died are seen as such by whoever looks on."""
    client = connection.connect(connection.tracking_uri(registry.tracking_uri))
    note_dead(registry, client)
    return client


def note_dead(
    registry: Registry, client: MlflowClient | None = None, *, hurried: bool = False
) -> None:
    """Mark an experiment's runs as killed that MLflow takes for running and nobody trains.

    What cannot be noted, as when MLflow does not answer, is said and stops nothing. By a ``client``
    of those who have one. Who is ``hurried``, at the end of a process, waits seconds for MLflow.
    """
    if hurried:
        os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
    try:
        client = client or connection.connect(connection.tracking_uri(registry.tracking_uri))
        for run in runs.runs_of(client, registry.experiment, "attributes.status = 'RUNNING'"):
            if RUN_TOKEN in run.data.tags and _is_dead(run.data.tags):
                client.set_terminated(run.info.run_id, "KILLED")
    except connection.failures() as error:
        say(f"MLflow: runs that died are not marked as such ({connection.first_line(error)})")


def _is_dead(tags: Mapping[str, str]) -> bool:
    """Whether the run with these tags is no longer trained.

    Where its folder is seen, that of its token, a run whose lock is held lives, and one of this
    kernel whose lock is free is dead. The lock of another machine may not be seen, nor the folder:
    such a run is dead when it is silent for long. This takes clocks to agree within minutes, and
    MLflow to be reached from there: one that finds it again shows itself running.
    """
    folder = Path(tags[FOLDER])
    try:
        seen = (folder / TOKEN).read_text() == tags[RUN_TOKEN]
        held = seen and is_held(folder / LOCK)
    except OSError:  # Not there, or not for us.
        seen = held = False
    if held:
        return False
    return (seen and tags[KERNEL] == kernel()) or time.time() - int(tags[ALIVE]) > SILENT_S
