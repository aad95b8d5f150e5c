"""Training state on disk: safetensors and JSON, whole or not there at all.

``RUN/step-00000300/`` holds ``weights.safetensors``, ``ema.safetensors``, their average,
``optimizer.safetensors`` and, written last, ``state.json`` with the step and each file's sha256.
``RUN/model.json`` says what the weights are the weights of.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ldm.artifacts import digest_file, write_json
from ldm.errors import UserError

STATE, MODEL = "state.json", "model.json"
PARTS = ("weights", "ema", "optimizer")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``step`` optimizer steps: three sets of tensors by name."""

    step: int
    weights: Tensors
    ema: Tensors
    optimizer: Tensors


@dataclass(frozen=True)
class Model:
    """What else it takes to draw with a checkpoint.

    ``unet``: content of its ``config.json``; ``schedule``: scheduler configuration; ``pipeline``
    and ``revision``: the name of the pipeline with the other parts.
    """

    unet: dict[str, Any]
    schedule: dict[str, Any]
    pipeline: str
    revision: str | None


def describe(run: Path, model: Model) -> None:
    """Write what the checkpoints of a run are checkpoints of."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / MODEL, asdict(model))


def averaged(folder: Path) -> tuple[Model, Tensors]:
    """A checkpoint's averaged weights, and their model; UserError if it is not whole."""
    if not is_whole(folder):
        raise UserError(f"{folder}: is no whole checkpoint; give another, or train again")
    about = folder.parent / MODEL
    if not about.is_file():
        raise UserError(f"{about}: is not there; give a checkpoint in the folder of its run")
    return Model(**json.loads(about.read_text())), load_file(folder / "ema.safetensors")


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write aside, sync, rename into place; then remove all but the newest ``keep``."""
    target = run / f"step-{checkpoint.step:08d}"
    fresh = run / f".{target.name}.writing"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    files = {}
    for part in PARTS:
        path = fresh / f"{part}.safetensors"
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in getattr(checkpoint, part).items()},
            path,
        )
        _sync(path)
        files[path.name] = digest_file(path)
    write_json(fresh / STATE, {"step": checkpoint.step, "files": files})
    _sync(fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    _sync(run)
    for old in folders(run)[:-keep]:
        shutil.rmtree(old)
    return target


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None; damaged ones are passed over."""
    for folder in reversed(folders(run)):
        if is_whole(folder):
            step = json.loads((folder / STATE).read_text())["step"]
            parts = {part: load_file(folder / f"{part}.safetensors") for part in PARTS}
            return Checkpoint(step, **parts)
    return None


def folders(run: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    return sorted(run.glob("step-*"))


def is_whole(folder: Path) -> bool:
    """Whether every file is there with the bytes that were written."""
    try:
        files = json.loads((folder / STATE).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all(
        (folder / name).is_file() and digest_file(folder / name) == digest
        for name, digest in files.items()
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """An AdamW optimizer's state as flat tensors: ``NUMBER.exp_avg`` and so on."""
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put back what :func:`optimizer_tensors` took."""
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
