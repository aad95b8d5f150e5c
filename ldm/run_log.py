"""The log of a run: a JSON line every few steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ldm.artifacts import write_whole
from ldm.errors import UserError, full_disk_told
from ldm.tracking.live import Live

LOG = "log.jsonl"
"""Its name, in the folder of a run and in that of the model."""
Entry = dict[str, Any]


class RunLog:
    """``log.jsonl``: lines up to the resumed step are kept, later ones are written anew.

    ``live`` is told of every line.
    """

    def __init__(self, path: Path, first: int, *, writes: bool, live: Live | None = None) -> None:
        self.path, self.writes, self.live = path, writes, live
        self.kept = [entry for entry in entries(path) if entry["step"] <= first]
        """What it held before, up to that step."""
        if writes:
            write_whole(path, "".join(f"{json.dumps(entry)}\n" for entry in self.kept).encode())

    def write(self, entry: Entry) -> None:
        """Append a line; only the main process writes."""
        if self.writes:
            with full_disk_told(self.path), self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if self.live:
                self.live.write(entry)

    def sync(self) -> None:
        """Have it on disk before a checkpoint is, which would not write these lines again."""
        if self.writes:
            with self.path.open("a") as file:
                os.fsync(file.fileno())


def entries(path: Path) -> list[Entry]:
    """The lines of a log, none if it is not there; a last one that was cut short is left out."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(
                    f"{path}: line {number} is damaged ({error}); remove that line"
                ) from error
    return found


def last_val_loss(folder: Path) -> float:
    """The validation loss that a run, or the model in this folder, ended with."""
    return float([one["val_loss"] for one in entries(folder / LOG) if "val_loss" in one][-1])
