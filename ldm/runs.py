"""Runs of a training: folders named by what decides the result, and going on from another one.

``RUN/run.json`` holds the settings, the digests of what is learned from and started with, and those
of the code that decides a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm import checkpoint
from ldm.artifacts import digest_file, digest_json, write_json
from ldm.checkpoint import Checkpoint
from ldm.config.section import flat
from ldm.errors import UserError, damage_told

RUN = "run.json"
PRUNED = "pruned"
"""In a run's folder, until the next start: ``ldm prune`` removed its checkpoints, or began to."""
INPUTS = {
    "images": "other pictures",
    "latents": "other latents",
    "start": "other starting weights",
    "schedule": "another noise schedule",
    "scaling": "another scaling of the latents",
    "text_encoder": "another text encoder",
    "tokenizer": "another tokenizer",
    "perceptual": "other perceptual features",
}
"""What a run is made from, and how that is called where it differs."""
Identity = dict[str, Any]
"""What decides a run's result: ``config``, ``inputs``, ``code`` and, maybe, ``from``; ``config`` is
of a training's section of the settings."""


def folder_of(runs: Path, identity: Identity, start: str = "") -> Path:
    """Where the run's checkpoints are; its name starts so."""
    return runs / f"{start}{digest_json(identity)[:12]}"


def describe(run: Path, identity: Identity) -> None:
    """Write what decides a run into its folder: it begins, or goes on."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / RUN, identity)
    (run / PRUNED).unlink(missing_ok=True)


def identity_of(run: Path) -> Identity:
    """What :func:`describe` wrote; UserError where that is no run, or it is damaged."""
    if not (run / RUN).is_file():
        of = run.parent if (run.parent / RUN).is_file() else None
        remedy = f"name its run, {of}" if of else "name a folder of runs/"
        raise UserError(f"{run}: is no run (has no {RUN}); {remedy}")
    with damage_told(run / RUN):
        known: Identity = json.loads((run / RUN).read_text())
        _ = known["config"].items(), known["inputs"].items(), known["code"]
    return known


def expect_unpruned(run: Path, remedy: str, parts: Sequence[str] = ("",)) -> None:
    """UserError where ``ldm prune`` has left no checkpoint of a run."""
    if (run / PRUNED).is_file() and not any(checkpoint.folders(run / part) for part in parts):
        raise UserError(f"{run}: has no checkpoints any more, `ldm prune` removed them; {remedy}")


def origin(checkpoints: Iterable[Path]) -> str:
    """What a run that goes on from these says of them, as ``from``."""
    return digest_json([digest_file(one / checkpoint.STATE) for one in checkpoints])


def continued(
    identity: Identity,
    earlier: Path,
    *,
    changed: bool,
    section: str = "train",
    parts: Sequence[str] = ("",),
) -> Identity:
    """The identity of a training that goes on from where the run ``earlier`` stands.

    Where nothing differs that is the run itself; otherwise a new one, with ``earlier`` left as it
    is. ``section`` names the settings, ``parts`` the folders in a run that have its checkpoints.
    UserError for differences that are not said to be meant (``changed``), naming them.
    """
    known = identity_of(earlier)
    expect_unpruned(earlier, "leave out --resume to train anew", parts)
    found = differences(known, identity, section)
    if not found:
        if "from" in known and not all(checkpoint.folders(earlier / part) for part in parts):
            raise UserError(
                f"{earlier}: began from another run and has not all checkpoints itself; name that "
                "one, with --changed"
            )
        return known
    if not changed:
        raise UserError(
            f"{earlier}: was trained otherwise ({'; '.join(found)}); undo that, or give --changed "
            "to go on from it all the same, as a run of its own"
        )
    before, now = (one["config"].get("optimizer") for one in (known, identity))
    if before != now:
        raise UserError(
            f"{earlier}: was trained by {before}, whose state is of no use to {now}; set "
            "train.optimizer back, or leave out --resume"
        )
    found_in = [checkpoint.newest_folder(earlier / part) for part in parts]
    stands = [newest for newest in found_in if newest]
    if not stands:
        raise UserError(f"{earlier}: has no whole checkpoint to go on from; leave out --resume")
    return {**identity, "from": origin(stands)}


def newest_of(run: Path, earlier: Path | None) -> tuple[Checkpoint | None, Path | None]:
    """What a training goes on from, None for nothing, and the other run that it is of, if it is.

    The newest whole checkpoint of its own run, or else of the ``earlier`` one.
    """
    found = checkpoint.newest(run)
    if found is not None or earlier is None:
        return found, None
    return checkpoint.newest(earlier), earlier


@contextmanager
def restoring(other: Path | None) -> Iterator[None]:
    """UserError where what is restored in the block, of another run, is of other weights."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        if other is None:
            raise
        raise UserError(
            f"{other}: trained other weights than this would; leave out --resume"
        ) from error


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], section: str = "train"
) -> list[str]:
    """What differs between two identities, in words: settings by name, the rest by its kind."""
    old, new = dict(flat(before["config"])), dict(flat(now["config"]))
    found = [
        f"{section}.{name} {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    found += [
        words
        for key, words in INPUTS.items()
        if before["inputs"].get(key) != now["inputs"].get(key)
    ]
    return found + (["other code"] if before["code"] != now["code"] else [])


def unfinished(runs: Path, identity: Identity) -> tuple[Path, list[str]] | None:
    """The run on the same latents that stands last before an end, and how it differs.

    Before its own end; or at that, and only the number of steps is another.
    """
    found = []
    for file in runs.glob(f"*/{RUN}"):
        try:
            known = identity_of(file.parent)
        except UserError:
            continue  # A damaged one is nothing to go on from.
        steps = [*map(checkpoint.step_of, checkpoint.folders(file.parent))]
        same_latents = known["inputs"].get("latents") == identity["inputs"]["latents"]
        if not same_latents or not steps or known == identity:
            continue
        changes = differences(known, identity)
        more = [one.startswith("train.steps ") for one in changes] == [True]
        end = identity["config"]["steps"] if more else known["config"]["steps"]
        if steps[-1] < end:
            found.append((file.stat().st_mtime, file.parent, changes))
    return max(found)[1:] if found else None
