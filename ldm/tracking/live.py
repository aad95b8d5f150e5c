"""A training in MLflow as it goes: figures, system metrics, sheets of samples, and its end.

Everything is written beside the training, which never waits for it and does not stop because of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread
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
HEAD_START_S = 3
"""How long a training is left alone: importing MLflow beside it made its first step take five times
as long."""
AGAIN_S = 30
"""How long after a failure it is tried again."""
Task = Callable[[runs.Run], None]
PATIENCE_S, STOPPED_PATIENCE_S = 60, 10
"""How long the end of a training waits for what is still to be written; one that was stopped."""


class Live:
    """Shows a run in MLflow while the block runs.

    What MLflow does not take is kept, and shown when it answers again; where it refuses the run,
    that is said once and no more is shown. ``settings`` are those of the whole training or, under
    its name, of each part.
    """

    def __init__(
        self, registry: Registry, run: Path, settings: Mapping[str, Any], stage: str = "train"
    ) -> None:
        self._registry, self._run, self._settings = registry, run.resolve(), settings
        self._stage = stage
        self._tasks: deque[Task] = deque()
        self._news = Event()
        self._ends = self._given_up = False
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
        stopped = kind is not None and issubclass(kind, (SystemExit, KeyboardInterrupt))
        if kind is not None and not stopped:
            self.status = "FAILED"
        self._ends = True
        self._news.set()
        patience = STOPPED_PATIENCE_S if stopped else PATIENCE_S
        self._thread.join(patience)
        if self._thread.is_alive():
            self._given_up = True
            say(f"{self._stage}: MLflow did not take all of the run within {patience} s")

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
        figures, at_ms = {(name, step): one for name, one in points.items()}, runs.now_ms()
        self._do(lambda run: run.log({}, figures, at_ms))

    def picture(self, path: Path, folder: str = "samples") -> None:
        """A sheet of samples, or of what else the folder is named for.

        One that is not taken is said and left: it lies in the run's folder.
        """

        def show(run: runs.Run) -> None:
            try:
                run.client.log_artifact(run.identity, str(path), folder)
            except Exception as error:  # Each kind of store has its own.
                say(f"{path}: not shown in MLflow ({connection.first_line(error)})")

        self._do(show)

    def finish(self, model_digest: str) -> None:
        """The training is done, and this is its model."""
        self.status = "FINISHED"
        tag = versions.MODEL_DIGEST, model_digest
        self._do(lambda run: run.client.set_tag(run.identity, *tag))

    def _do(self, task: Task) -> None:
        if not self._given_up:
            self._tasks.append(task)
            self._news.set()

    def _work(self) -> None:
        """The thread: what is queued, in order, until the end; after a failure once more."""
        told = False
        self._news.wait(HEAD_START_S)
        while not self._given_up:
            try:
                self._show()
                return
            except connection.failures() as error:
                line = connection.first_line(error)
                if connection.is_refusal(error):
                    self._given_up = True
                    self._tasks.clear()
                    say(f"{self._stage}: MLflow refuses the run ({line}); it goes on unseen")
                    return
                if not told:
                    say(f"{self._stage}: MLflow does not take the run ({line}); trying again")
                told = True
            self._pause()

    def _pause(self) -> None:
        """Until it is time for another try; at the end that is soon."""
        begin = time.monotonic()
        while (left := begin + (1 if self._ends else AGAIN_S) - time.monotonic()) > 0:
            self._news.wait(left)
            self._news.clear()

    def _show(self) -> None:
        """Find the run again or make it, and write what is queued; raises what MLflow does."""
        client = connection.connect(connection.tracking_uri(self._registry.tracking_uri))
        note_dead(self._registry, client)
        tags, name = life_tags(self._run), self._run.name
        run = runs.continue_run(client, self._registry.experiment, name, tags, RUN_TOKEN)
        with runs.system_metrics(run):
            # What it has stays as it is: MLflow refuses another value.
            known = client.get_run(run.identity).data.params
            run.log({name: one for name, one in flat(self._settings) if name not in known}, {})
            self._write_queued(run)
        client.set_terminated(run.identity, self.status)

    def _write_queued(self, run: runs.Run) -> None:
        """What is queued, until the end; meanwhile the run says now and then that it lives.

        One that was taken for dead, on a machine that slept, is running again.
        """
        beat = time.monotonic()
        while not self._ends or self._tasks:  # In this order: the last one comes before the end.
            if self._tasks:
                self._tasks[0](run)
                self._tasks.popleft()  # Behind it: what fails stays.
            else:
                self._news.wait(BEAT_S)
                self._news.clear()
            if time.monotonic() - beat >= BEAT_S:
                run.lives(life_tags(self._run))
                beat = time.monotonic()
