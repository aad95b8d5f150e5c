"""Training state on disk: safetensors and JSON, whole or not there at all.

``RUN/step-00000300/`` holds ``weights.safetensors``, ``ema.safetensors``, their average,
``optimizer.safetensors``, ``random.safetensors``, of these what a training has, and, written last,
``state.json`` with the step, each file's sha256 and a digest of its own. ``RUN/model.json`` says
what a denoiser's weights are the weights of.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ldm.artifacts import digest_file, digest_json, write_json
from ldm.errors import UserError, damage_told, is_full
from ldm.progress import say

STATE, MODEL = "state.json", "model.json"
OWN = "digest"
"""In ``state.json``: of the rest of it."""
PARTS = ("weights", "ema", "optimizer", "random")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``step`` optimizer steps: sets of tensors by name; an empty one has no file.

    ``val_loss``: of the averaged weights, where this step was validated. ``random``: the state of
    generators, where a step's draws are no function of its number. ``averaged``: the step up to
    which ``ema`` goes.
    """

    step: int
    weights: Tensors
    ema: Tensors
    optimizer: Tensors
    val_loss: float | None = None
    random: Tensors = field(default_factory=dict)
    averaged: int = 0

    @property
    def size(self) -> int:
        """In bytes, of all tensors."""
        return sum(one.nbytes for part in PARTS for one in getattr(self, part).values())

    def copied(self) -> Checkpoint:
        """The same state in memory of its own, on the CPU."""
        return self.with_tensors({part: _on_cpu(getattr(self, part), copy=True) for part in PARTS})

    def with_tensors(self, parts: Mapping[str, Tensors]) -> Checkpoint:
        """The same state with other tensors."""
        changed: dict[str, Any] = dict(parts)
        return replace(self, **changed)


@dataclass(frozen=True)
class Model:
    """What else it takes to draw with a checkpoint.

    ``unet``: content of its ``config.json``; ``schedule``: scheduler configuration; ``pipeline``
    and ``revision``: the name of the pipeline with the other parts; ``lora``: where the weights are
    adapters, what they go with (:class:`ldm.lora.Base`).
    """

    unet: dict[str, Any]
    schedule: dict[str, Any]
    pipeline: str
    revision: str | None
    lora: dict[str, Any] | None = None


def describe(run: Path, model: Model) -> None:
    """Write what the checkpoints of a run are checkpoints of."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / MODEL, asdict(model))


def averaged(folder: Path) -> tuple[Model, Tensors]:
    """A checkpoint's averaged weights, and their model; UserError if it is not whole."""
    if damage := damage_of(folder):
        raise UserError(f"{damage}: give another checkpoint, or train again")
    about = folder.parent / MODEL
    if not about.is_file():
        raise UserError(f"{about}: is not there; give a checkpoint in the folder of its run")
    with damage_told(about):
        model = Model(**json.loads(about.read_text()))
    return model, _tensors(folder / "ema.safetensors")


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write aside, sync, rename into place; then remove all but the newest ``keep`` and the best.

    A whole one of this step that is there already is the one that was gone on from, and only gets
    its validation loss. UserError if the disk does not take it; the earlier ones are left as they
    are.
    """
    target = run / f"step-{checkpoint.step:08d}"
    fresh = aside(target)
    for leftover in leftovers(run):
        shutil.rmtree(leftover)
    try:
        if damage_of(target) is None:
            state = _state(target)
            assert state is not None  # It has no damage.
            if checkpoint.val_loss is not None:
                _write_state(target, state | {"val_loss": checkpoint.val_loss})
        else:
            fresh.mkdir(parents=True)
            _write(fresh, checkpoint)
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
        _sync(run)
    except (OSError, SafetensorError) as error:
        remedy = "make room" if is_full(error) else "mend that"
        raise UserError(
            f"{target}: the checkpoint could not be written ({error}); {remedy} and run the same "
            "command again"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _prune(run, keep, target)
    return target


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    files = {}
    with ThreadPoolExecutor(1) as pool:  # A file's digest while the next file is written.
        for part in PARTS:
            if tensors := getattr(checkpoint, part):
                path = folder / f"{part}.safetensors"
                save_file(_on_cpu(tensors), path)
                files[path.name] = pool.submit(_synced, path)
    numbers = {name: getattr(checkpoint, name) for name in ("step", "averaged", "val_loss")}
    digests = {name: digest.result() for name, digest in files.items()}
    _write_state(folder, numbers | {"files": digests})


def _synced(path: Path) -> str:
    """The digest of a file that is on disk now."""
    _sync(path)
    return digest_file(path)


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    """``state.json``, with its own digest."""
    write_json(folder / STATE, state | {OWN: digest_json(state)})
    _sync(folder)


def _on_cpu(tensors: Tensors, *, copy: bool = False) -> Tensors:
    """As a file takes them; in memory of their own with ``copy``, else where that can be spared.

    A file takes no two that share memory, as the tables of 8-bit AdamW do.
    """
    found: Tensors = {}
    seen = set()
    for name, tensor in tensors.items():
        one = tensor.detach().to("cpu", copy=copy).contiguous()
        place = one.untyped_storage().data_ptr()
        found[name] = one.clone() if place in seen else one
        seen.add(place)
    return found


def _prune(run: Path, keep: int, newest: Path) -> None:
    """Remove all but ``keep`` up to the newest and the one with the lowest validation loss.

    Later ones, which are damaged or it would not be written again, count for nothing.
    """
    found = [folder for folder in folders(run) if folder <= newest]
    for old in {*found[:-keep]} - {best(run, newest)}:
        try:
            shutil.rmtree(old)
        except OSError as error:
            say(f"{old}: an old checkpoint that cannot be removed ({error})")


def best(run: Path, newest: Path | None = None) -> Path | None:
    """The checkpoint with the lowest validation loss, up to the ``newest`` that counts.

    None if none has one.
    """
    found = [folder for folder in folders(run) if newest is None or folder <= newest]
    losses = {folder: loss for folder in found if (loss := _val_loss(folder)) < math.inf}
    return min(losses, key=losses.__getitem__, default=None)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named by."""
    return int(folder.name.removeprefix("step-"))


def _val_loss(folder: Path) -> float:
    """A checkpoint's validation loss; infinite where it has none."""
    loss = (_state(folder) or {}).get("val_loss")
    return math.inf if loss is None else float(loss)


def _state(folder: Path) -> dict[str, Any] | None:
    """What ``state.json`` says; None if it is not there, or not as it was written."""
    try:
        state = json.loads((folder / STATE).read_text())
        digest = state.pop(OWN)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    return state if digest == digest_json(state) else None


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, None if there is none; UserError as below."""
    folder = newest_folder(run)
    if folder is None:
        return None
    state = _state(folder)
    assert state is not None  # It has no damage.
    paths = {part: folder / f"{part}.safetensors" for part in PARTS}
    parts = {
        part: _tensors(path) if path.name in state["files"] else {} for part, path in paths.items()
    }
    averaged, val_loss = state["averaged"], state["val_loss"]
    return Checkpoint(state["step"], **parts, val_loss=val_loss, averaged=averaged)


def _tensors(path: Path) -> Tensors:
    """UserError for a file that is gone since, or was no safetensors when its digest was taken."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        gone = f"{path.parent}: was removed meanwhile, by its training or `ldm prune`"
        raise UserError(f"{gone}; name another checkpoint") from error
    except SafetensorError as error:
        raise UserError(
            f"{path}: is no safetensors file ({error}), though its digest agrees: no training "
            f"wrote it; remove {path.parent}"
        ) from error


def newest_folder(run: Path) -> Path | None:
    """Where the newest whole checkpoint is, None if there is none.

    Damaged ones are named and passed over; UserError where all are damaged.
    """
    found = folders(run)
    for folder in reversed(found):
        damage = damage_of(folder)
        if damage is None:
            return folder
        if folder == found[0]:
            raise UserError(
                f"{damage}, and there is no earlier checkpoint; put the file back, or move {run} "
                "away to begin anew"
            )
        say(f"{damage}; going on from an earlier checkpoint")
    return None


def folders(run: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    return sorted(one for one in run.glob("step-*") if one.name.removeprefix("step-").isdigit())


def aside(folder: Path) -> Path:
    """Where a checkpoint is while it is written, or removed: what is there counts for nothing."""
    return folder.with_name(f".{folder.name}.writing")


def leftovers(run: Path) -> list[Path]:
    """What is aside in a run; the next :func:`save` takes it away."""
    return sorted(run.glob(".step-*.writing"))


def damage_of(folder: Path) -> str | None:
    """Which file of a checkpoint is not as it was written; None if it is whole."""
    state = _state(folder)
    if state is None:
        return f"{folder / STATE} is missing or altered, or of an earlier version"
    for name, digest in state["files"].items():
        if not (folder / name).is_file() or digest_file(folder / name) != digest:
            return f"{folder / name} is missing or altered"
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
