"""The process in which img2dataset runs: ``python -m ldm.ingest.download``, settings on stdin."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from functools import partial
from types import ModuleType
from typing import Any


def main() -> None:
    """Read one line of JSON, the arguments of ``img2dataset.download``, and run it.

    Among them are the fields of two of ours: ``guard``, the :class:`ldm.ingest.guard.Guard` that
    fetches instead, and ``rules``, the :class:`ldm.ingest.pictures.Rules` of what is taken.

    Standard input stays open as the sign that the parent lives.
    """
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    img2dataset: Any = importlib.import_module("img2dataset.main")
    guard = importlib.import_module("ldm.ingest.guard").Guard(**settings.pop("guard"))
    downloader = importlib.import_module("ldm.ingest.downloader").GuardedDownloader
    img2dataset.Downloader = partial(downloader, guard=guard)
    rules = importlib.import_module("ldm.ingest.pictures").Rules(**settings.pop("rules"))
    resizer = importlib.import_module("ldm.ingest.resizer").CheckedResizer
    img2dataset.Resizer = partial(resizer, rules=rules)
    if settings["distributor"] == "ray":
        importlib.import_module("ldm.ingest.cluster").join(settings["processes_count"])
    img2dataset.download(**settings)


def _end_with_parent() -> None:
    """When the parent is gone, end this process and the workers that img2dataset started."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def _leave_out_unused() -> None:
    """Keep torch and wandb from being imported: unused here, and over half of the start-up."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    sys.modules["wandb"] = ModuleType("wandb")


if __name__ in ("__main__", "__mp_main__"):  # the second: workers import the main module again
    _leave_out_unused()
if __name__ == "__main__":
    main()
