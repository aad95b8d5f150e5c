"""A training in MLflow as it goes: figures, system metrics, sheets of samples, and its end.

Everything is written beside the training, which never waits for it and does not stop because of it.
A run that was killed cannot say so itself: whoever looks next finds its lock free and notes it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self

from ldm import tracking
from ldm.config import Registry
from ldm.config.section import flat
from ldm.locks import is_held
from ldm.progress import say

LOCK = "lock"
"""In a run's folder: held as long as the training lives."""
FOLDER, HOST = "run_folder", "host"
"""Tags of a run."""
NAMES = {"loss": "train_loss"} | {key: key for key in ("lr", "gradient_norm", "val_loss")}
"""Metrics by their key in ``log.jsonl``."""
Task = Callable[[tracking.Run], None]
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
        self._registry, self._run, self._settings = registry, run.absolute(), settings
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
        tag = tracking.MODEL_DIGEST, model_digest
        self._do(lambda run: run.client.set_tag(run.identity, *tag))

    def _do(self, task: Task) -> None:
        if self._thread.is_alive():
            self._tasks.put(task)

    def _work(self) -> None:
        """The thread: what is queued, in order, until the end."""
        try:
            client = tracking.connect(tracking.tracking_uri(self._registry.tracking_uri))
            note_dead(self._registry)
            tags = {FOLDER: str(self._run), HOST: platform.node()}
            run = tracking.continue_run(client, self._registry.experiment, self._run.name, tags)
            with tracking.system_metrics(run):
                run.log(dict(flat(self._settings)), {})
                while task := self._tasks.get():
                    task(run)
            client.set_terminated(run.identity, self.status)
        except tracking.failures() as error:
            say(f"{self._stage}: not shown in MLflow from here on ({tracking.first_line(error)})")


def note_dead(registry: Registry) -> None:
    """Mark runs of this machine as killed that MLflow takes for running and nobody trains."""
    client = tracking.connect(tracking.tracking_uri(registry.tracking_uri))
    wanted = f"attributes.status = 'RUNNING' and tags.{HOST} = '{platform.node()}'"
    for run in tracking.runs_of(client, registry.experiment, wanted):
        folder = run.data.tags.get(FOLDER)
        if folder and not is_held(Path(folder) / LOCK):
            client.set_terminated(run.info.run_id, "KILLED")
