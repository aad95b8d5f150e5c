"""A training in MLflow as it goes: figures, system metrics, sheets of samples, and its end.

Everything is written beside the training, which never waits for it and does not stop because of it.
A run that was killed cannot say so itself: whoever looks next finds its lock free, or that it has
been silent for long, and notes it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from ldm.artifacts import write_whole
from ldm.config import Registry
from ldm.config.section import flat
from ldm.locks import is_held, kernel
from ldm.progress import say
from ldm.tracking import connection, runs, versions

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
BEAT_S, SILENT_S = 60, 1800
"""How often a run says so, and after how long without it is taken for dead."""
NAMES = {"loss": "train_loss"} | {key: key for key in ("lr", "gradient_norm", "val_loss")}
"""Metrics by their key in ``log.jsonl``."""
Task = Callable[[runs.Run], None]
PATIENCE_S = 60
"""How long the end of a training waits for what is still to be written."""


def metrics_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line of ``log.jsonl`` by metric; what has no value is left out.

    Those of a part of the first stage are called ``PART/FIGURE``.
    """
    if part := entry.get("part"):
        figures = {key: value for key, value in entry.items() if key not in ("part", "step")}
        return {f"{part}/{key}": float(one) for key, one in figures.items() if one is not None}
    found = {NAMES[key]: float(entry[key]) for key in NAMES if key in entry}
    for number, loss in enumerate(entry.get("val_loss_bands", ())):
        if loss is not None:
            found[f"val_loss_band_{number}"] = float(loss)
    return found | ({"skipped": 1.0} if "skipped" in entry else {})


class Live:
    """Shows a run in MLflow while the block runs.

    ``settings`` are those of the whole training or, under its name, of each part.
    """

    def __init__(
        self, registry: Registry, run: Path, settings: Mapping[str, Any], stage: str = "train"
    ) -> None:
        self._registry, self._run, self._settings = registry, run.resolve(), settings
        self._stage = stage
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._thread = Thread(target=self._work, daemon=True)
        self._last: tuple[str | None, int, float] | None = None
        self.status = "KILLED"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not issubclass(kind, (SystemExit, KeyboardInterrupt)):
            self.status = "FAILED"
        self._tasks.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            say(f"{self._stage}: MLflow did not take all of the run within {PATIENCE_S} s")

    def write(self, entry: Mapping[str, Any]) -> None:
        """A line of ``log.jsonl``, with the samples a second since the line before."""
        step, now, points = int(entry["step"]), time.monotonic(), metrics_of(entry)
        if "loss" in entry:
            part = entry.get("part")
            if self._last and self._last[0] == part and step > self._last[1]:
                settings = self._settings[part] if part else self._settings
                samples = (step - self._last[1]) * settings["batch_size"]
                name = f"{part}/samples_per_second" if part else "samples_per_second"
                points[name] = samples / (now - self._last[2])
            self._last = part, step, now
        self._do(lambda run: run.log({}, {(name, step): one for name, one in points.items()}))

    def picture(self, path: Path, folder: str = "samples") -> None:
        """A sheet of samples, or of what else the folder is named for."""
        self._do(lambda run: run.client.log_artifact(run.identity, str(path), folder))

    def finish(self, model_digest: str) -> None:
        """The training is done, and this is its model."""
        self.status = "FINISHED"
        tag = versions.MODEL_DIGEST, model_digest
        self._do(lambda run: run.client.set_tag(run.identity, *tag))

    def _do(self, task: Task) -> None:
        if self._thread.is_alive():
            self._tasks.put(task)

    def _work(self) -> None:
        """The thread: what is queued, in order, until the end."""
        try:
            client = connection.connect(connection.tracking_uri(self._registry.tracking_uri))
            note_dead(self._registry, client)
            tags = self._tags()
            run = runs.continue_run(
                client, self._registry.experiment, self._run.name, tags, RUN_TOKEN
            )
            with runs.system_metrics(run):
                run.log(dict(flat(self._settings)), {})
                for task in self._queued(run):
                    task(run)
            client.set_terminated(run.identity, self.status)
        except connection.failures() as error:
            say(f"{self._stage}: not shown in MLflow from here on ({connection.first_line(error)})")

    def _queued(self, run: runs.Run) -> Iterator[Task]:
        """What is queued, until the end; meanwhile the run says now and then that it lives.

        One that was taken for dead, on a machine that slept, is running again.
        """
        beat = time.monotonic()
        while True:
            with suppress(Empty):
                task = self._tasks.get(timeout=BEAT_S)
                if task is None:
                    return
                yield task
            if time.monotonic() - beat >= BEAT_S:
                run.lives(self._tags())
                beat = time.monotonic()

    def _tags(self) -> dict[str, str]:
        """What tells the run, and whether it lives."""
        tags = {FOLDER: str(self._run), RUN_TOKEN: _token(self._run), KERNEL: kernel()}
        return tags | {HOST: platform.node(), ALIVE: str(int(time.time()))}


def _token(run: Path) -> str:
    """The token in a run's folder, made if there is none."""
    file = run / TOKEN
    if not file.is_file():
        write_whole(file, uuid4().hex.encode())
    return file.read_text()


def note_dead(registry: Registry, client: MlflowClient | None = None) -> None:
    """Mark an experiment's runs as killed that MLflow takes for running and nobody trains.

    What cannot be noted, as when MLflow does not answer, is said and stops nothing. By a ``client``
    of those who have one.
    """
    try:
        client = client or connection.connect(connection.tracking_uri(registry.tracking_uri))
        for run in runs.runs_of(client, registry.experiment, "attributes.status = 'RUNNING'"):
            if RUN_TOKEN in run.data.tags and _is_dead(run.data.tags):
                client.set_terminated(run.info.run_id, "KILLED")
    except connection.failures() as error:
        say(f"MLflow: runs that died are not marked as such ({connection.first_line(error)})")


def connected(registry: Registry) -> MlflowClient:
    """A client; trainings that died are seen as such by whoever looks on."""
    client = connection.connect(connection.tracking_uri(registry.tracking_uri))
    note_dead(registry, client)
    return client


def _is_dead(tags: Mapping[str, str]) -> bool:
    """Whether the run with these tags is no longer trained.

    Where its folder is seen, that of its token, a run whose lock is held lives, and one of this
    kernel whose lock is free is dead. The lock of another machine may not be seen, nor the folder:
    such a run is dead when it is silent for long. This takes clocks to agree within minutes, and
    MLflow to be reached from there: a training that lost it is not shown any more anyway.
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
