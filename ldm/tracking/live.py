"""A training in MLflow as it goes: figures, system metrics, sheets of samples, and its end.

Everything is written beside the training, which never waits for it and does not stop because of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self

from ldm.config import Registry
from ldm.config.section import flat
from ldm.progress import say
from ldm.run_log import metrics_of
from ldm.tracking import connection, runs, versions
from ldm.tracking.liveness import RUN_TOKEN, life_tags, note_dead

BEAT_S = 60
"""How often a run says that it lives."""
Task = Callable[[runs.Run], None]
PATIENCE_S = 60
"""How long the end of a training waits for what is still to be written."""


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
            tags = life_tags(self._run)
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
                run.lives(life_tags(self._run))
                beat = time.monotonic()
