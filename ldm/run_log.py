"""The log of a run: a JSON line every few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.artifacts import write_whole
from ldm.live import Live

LOG = "log.jsonl"
"""Its name, in the folder of a run and in that of the model."""


class RunLog:
    """``log.jsonl``: lines up to the resumed step are kept, later ones are written anew.

    ``live`` is told of every line.
    """

    def __init__(self, path: Path, first: int, *, writes: bool, live: Live | None = None) -> None:
        self.path, self.writes, self.live = path, writes, live
        if writes:
            lines = path.read_text().splitlines() if path.is_file() else []
            kept = [line for line in lines if line and json.loads(line)["step"] <= first]
            write_whole(path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line; only the main process writes."""
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if self.live:
                self.live.write(entry)


def last_val_loss(folder: Path) -> float:
    """The validation loss that a run, or the model in this folder, ended with."""
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return float([line["val_loss"] for line in lines if "val_loss" in line][-1])
