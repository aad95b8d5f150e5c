"""``ldm prune``: trainings that have ended give up their checkpoints, all but the newest.

What a run tells of itself stays: ``run.json``, its logs, its sheets.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ldm import checkpoint
from ldm.artifacts import Manifest, manifest_of
from ldm.errors import UserError
from ldm.locks import held, is_held
from ldm.progress import say
from ldm.runs import PRUNED, RUN, Identity, identity_of, origin
from ldm.tracking.liveness import LOCK


@dataclass(frozen=True)
class Training:
    """A run of a training or a first stage, as it was when it was looked at.

    ``ends``: the last step by the folder of its checkpoints: the run itself, or one for each part,
    in the order in which they are trained. ``at``: when it was last begun or saved, in seconds
    since 1970.
    """

    run: Path
    identity: Identity
    ends: dict[str, int]
    at: float

    @classmethod
    def of(cls, run: Path) -> Self | None:
        """None where it cannot be read, so that nothing is known of it."""
        try:
            identity = identity_of(run)
            ends, _ = _ends(identity["config"]), identity["inputs"]
        except (ValueError, TypeError, KeyError):
            return None
        return cls(run, identity, ends, _last_change(run, ends))

    @property
    def kind(self) -> str:
        """What is counted by itself."""
        return "train" if "" in self.ends else "first-stage"

    def checkpoints(self, part: str) -> list[Path]:
        """Of a part, oldest first."""
        return checkpoint.folders(self.run / part)

    def all_checkpoints(self) -> list[Path]:
        """In an order in which they may go: what is left was left by a stop, as it were.

        So the last part goes first, and of each the newest last.
        """
        return [one for part in reversed(self.ends) for one in self.checkpoints(part)]

    def leftovers(self) -> list[Path]:
        """What was being written, or removed, when a process was killed."""
        return [one for part in self.ends for one in checkpoint.leftovers(self.run / part)]

    def size(self) -> int:
        """In bytes, of all that would be removed."""
        folders = [*self.all_checkpoints(), *self.leftovers()]
        return sum(one.stat().st_size for folder in folders for one in folder.iterdir())

    def is_trained(self) -> bool:
        """Whether a process is at it."""
        return is_held(self.run / LOCK)

    def has_ended(self) -> bool:
        """Whether the last checkpoint of each part is whole and of its last step; this reads them.

        A part of a run that went on from another one may have none, where that had taken its steps.
        """
        newest, last = self.newest(), next(reversed(self.ends), None)
        return last in newest and all(
            checkpoint.step_of(one) == self.ends[part] and checkpoint.damage_of(one) is None
            for part, one in newest.items()
        )

    def newest(self) -> dict[str, Path]:
        """The newest checkpoint of each part that has some."""
        return {part: found[-1] for part in self.ends if (found := self.checkpoints(part))}

    def origins(self) -> set[str]:
        """What runs that go on from it, in all or its first parts, say of that."""
        found = [one for one in self.newest().values() if (one / checkpoint.STATE).is_file()]
        return {origin(found[:count]) for count in range(1, len(found) + 1)}

    def made(self, model: Manifest | None) -> bool:
        """Whether these settings and inputs made a model."""
        return (
            model is not None
            and model.config == self.identity["config"]
            and model.inputs.items() <= self.identity["inputs"].items()
        )


def prune(runs: Path, keep: int, model: Path, *, dry_run: bool = False) -> None:
    """Remove the checkpoints of all ended trainings in ``runs`` but the newest ``keep`` of a kind.

    Those of the one that made ``model`` stay too, unless ``keep`` is 0, and so do those that an
    unfinished training went on from. That itself, and one that a process is at, are left as they
    are. Killed, the same command goes on; checkpoints are whole or not there. With ``dry_run``
    nothing is removed, and what would be is named.
    """
    if keep < 0:
        raise UserError(f"--keep {keep}: is no number of trainings; give 0 or more")
    if not runs.is_dir():
        raise UserError(f"{runs}: no such directory; name the one that trainings had as --runs")
    found = [one for file in sorted(runs.glob(f"*/{RUN}")) if (one := Training.of(file.parent))]
    ended, unfinished = _sorted_out(found)
    old = _old(ended, keep, manifest_of(model, "run `ldm train` to make it"))
    wanted = {one.identity["from"] for one in unfinished if "from" in one.identity}
    needed = [one for one in old if one.origins() & wanted] if wanted else []
    going = [(one, one.size()) for one in old if one not in needed]
    if dry_run:
        for one, size in going:
            say(f"{one.run}: {_readable(size)}")
    else:
        going = [(one, size) for one, size in going if _remove(one)]
    what = f"{len(going)} of {len(ended)} ended trainings, {_readable(sum(s for _, s in going))}"
    resumable = [one for one in unfinished if one.all_checkpoints() or one.is_trained()]
    left = f"{len(resumable)} unfinished{', and what they go on from' if needed else ''}"
    done = "would remove" if dry_run else "removed"
    say(f"prune: {done} the checkpoints of {what}; left as they are: {left}")


def _sorted_out(found: list[Training]) -> tuple[list[Training], list[Training]]:
    """Those that have ended and have checkpoints, the newest first, and those that have not ended.

    One whose removal was cut short has ended, whatever is left of it.
    """
    ended, unfinished = [], []
    for one in found:
        pruned = (one.run / PRUNED).is_file()
        if one.is_trained() or not (pruned or one.has_ended()):
            unfinished.append(one)
        elif one.all_checkpoints() or one.leftovers():
            ended.append(one)
    return sorted(ended, key=lambda one: one.at, reverse=True), unfinished


def _old(ended: list[Training], keep: int, model: Manifest | None) -> list[Training]:
    """All but the newest of each kind, and the newest that made the model."""
    kinds = {one.kind: [other for other in ended if other.kind == one.kind] for one in ended}
    old = [one for kind in kinds.values() for one in kind[keep:]]
    made = next((one for one in ended if one.made(model)), None)
    return [one for one in old if keep == 0 or one is not made]


def _remove(one: Training) -> bool:
    """Remove a run's checkpoints; False where a process is, or was, at it by now.

    Each gets the name of one that is not yet whole, which counts for nothing: the next training
    takes such away, as the next prune does.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held(one.run / LOCK, f"{one.run}: is trained"))
        except UserError:
            return False
        if _last_change(one.run, one.ends) != one.at:
            return False
        try:
            (one.run / PRUNED).touch()
            for leftover in one.leftovers():
                shutil.rmtree(leftover)
            for folder in one.all_checkpoints():
                folder.rename(checkpoint.aside(folder))
            for leftover in one.leftovers():
                shutil.rmtree(leftover)
        except OSError as error:
            raise UserError(
                f"{one.run}: its checkpoints cannot be removed ({error}); mend that and run the "
                "same command again"
            ) from error
    return True


def _ends(config: Mapping[str, Any]) -> dict[str, int]:
    if "steps" in config:
        return {"": config["steps"]}
    parts = {part: one["steps"] for part, one in config.items() if isinstance(one, Mapping)}
    return {part: steps for part, steps in parts.items() if steps}


def _last_change(run: Path, ends: Mapping[str, int]) -> float:
    """``run.json`` is written by every start, one that has nothing left to train too."""
    times = [0.0]
    for one in (run / RUN, *(one for part in ends for one in checkpoint.folders(run / part))):
        with suppress(FileNotFoundError):  # A training that goes on removes old ones itself.
            times.append(one.stat().st_mtime)
    return max(times)


def _readable(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
