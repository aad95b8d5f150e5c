"""The log of a run: a JSON line every few steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from ldm.artifacts import write_whole
from ldm.errors import UserError, full_disk_told

LOG = "log.jsonl"
"""Its name, in the folder of a run and in that of the model."""
Entry = dict[str, Any]
NAMES = {"loss": "train_loss"} | {
    key: key for key in ("lr", "gradient_norm", "loss_scale", "val_loss")
}
"""Metrics by their key in ``log.jsonl``; ``loss_scale`` is that of fp16 after an overflow."""


class RunLog:
    """``log.jsonl``: lines up to the resumed step are kept, later ones are written anew.

    ``tell`` gets every line.
    """

    def __init__(
        self, path: Path, first: int, *, writes: bool, tell: Callable[[Entry], None] | None = None
    ) -> None:
        self.path, self.writes, self.tell = path, writes, tell
        self.kept = [entry for entry in entries(path) if entry["step"] <= first]
        """What it held before, up to that step."""
        if writes:
            write_whole(path, as_lines(self.kept))

    def skipped_up_to(self, step: int) -> int:
        """How many steps in a row, this one the last, were skipped before."""
        known = {entry["step"] for entry in self.kept if "skipped" in entry}
        return next(number for number in count() if step - number not in known)

    def write(self, entry: Entry) -> None:
        """Append a line; only the main process writes."""
        if self.writes:
            with full_disk_told(self.path), self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if self.tell:
                self.tell(entry)

    def sync(self) -> None:
        """Have it on disk before a checkpoint is, which would not write these lines again."""
        if self.writes:
            with self.path.open("a") as file:
                os.fsync(file.fileno())


def entries(path: Path) -> list[Entry]:
    """The lines of a log, none if it is not there; a last one that was cut short is left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(_entry(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(
                    f"{path}: line {number} is damaged ({error}); remove that line"
                ) from error
    return found


def _entry(line: bytes) -> Entry:
    """ValueError for what no log has."""
    entry = json.loads(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        raise ValueError("has no step")
    return entry


def as_lines(lines: Iterable[Entry]) -> bytes:
    """The content of a log with these lines."""
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


def metrics_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line of ``log.jsonl`` by metric; what has no value is left out.

    Those of a part of the first stage are called ``PART/FIGURE``.
    """
    if part := entry.get("part"):
        if "skipped" in entry:
            return {f"{part}/skipped": 1.0}
        figures = {key: value for key, value in entry.items() if key not in ("part", "step")}
        return {f"{part}/{key}": float(one) for key, one in figures.items() if one is not None}
    found = {NAMES[key]: float(entry[key]) for key in NAMES if key in entry}
    for number, loss in enumerate(entry.get("val_loss_bands", ())):
        if loss is not None:
            found[f"val_loss_band_{number}"] = float(loss)
    return found | ({"skipped": 1.0} if "skipped" in entry else {})


def last_val_loss(folder: Path) -> float:
    """The validation loss that a run, or the model in this folder, ended with."""
    return float([one["val_loss"] for one in entries(folder / LOG) if "val_loss" in one][-1])
