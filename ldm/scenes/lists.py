"""The lists under ``data/``: URL pairs for training and validation, prompts for evaluation.

Everything is drawn from :mod:`random` with fixed seeds, so the bytes are the same on any machine.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.artifacts import write_whole
from ldm.errors import UserError
from ldm.scenes.captions import caption, plain_caption
from ldm.scenes.world import (
    FORMS,
    KNOWN_SHAPES,
    NEW_SHAPES,
    OUTLINE,
    SHAPES,
    Description,
    Kind,
    Scene,
    describe,
    form_at,
    lay_out,
)

ORIGIN = "http://127.0.0.1:8964"
"""Where the embedded origin serves; the lists name it."""
SPLITS, PROMPTS = ("train", "validation"), "prompts.jsonl"


@dataclass(frozen=True)
class World:
    """What a list's rows show: forms, and in a ``share`` of them a shape that is not known."""

    forms: Mapping[str, float]
    unknown: tuple[str, ...]
    share: float


WORLDS = {
    "retrain": World(FORMS, NEW_SHAPES, 0.5),
    "scratch": World({"one": 0.25, "count": 0.20, "relation": 0.55}, (OUTLINE,), 0.6),
    "polish": World({"one": 0.30, "count": 0.45, "relation": 0.25}, (OUTLINE,), 0.4),
}
"""``retrain`` is the demo's list, with shapes that ``tiny`` never saw; ``scratch`` the one that
``tiny`` was made from, with made-up shapes. Which colour goes with which shape, and which stands
where, takes the longest to learn. After it the counts are what comes out worst: ``polish``."""

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it fill [0, 1) evenly."""

BAD_ROWS = ("missing", "html", "truncated", "duplicate", "empty-caption")
BAD_SHARE = 0.02


def scene_of(world: str, split: str, row: int) -> tuple[Description, Scene]:
    """The description and layout behind a row: a pure function of its name."""
    drawn_from = WORLDS[world]
    rng = random.Random(f"{world}/{split}/{row}")
    unknown = rng.random() < drawn_from.share
    description = _until(
        lambda found: found.is_known != unknown and not found.held_out,
        rng,
        (*KNOWN_SHAPES, *drawn_from.unknown),
        drawn_from.forms,
    )
    return description, lay_out(description, rng)


def caption_of(world: str, split: str, row: int) -> str:
    """A row's caption, in one of the wordings."""
    description, _ = scene_of(world, split, row)
    return caption(description, random.Random(f"{world}/{split}/{row}/caption"))


def write_lists(
    folder: Path, world: str, rows: int, validation_rows: int, prompts_a_group: int
) -> None:
    """Write ``train.csv``, ``validation.csv`` (url, caption) and ``prompts.jsonl``.

    UserError where one of them is there and was not written by this.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, mark in (*((f"{split}.csv", ORIGIN) for split in SPLITS), (PROMPTS, '"scene"')):
        _expect_own(folder / name, mark)
    for split, count in zip(SPLITS, (rows, validation_rows), strict=True):
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("url", "caption"))
        table.writerows(_rows(world, split, count))
        write_whole(folder / f"{split}.csv", text.getvalue().encode())
    lines = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts(prompts_a_group)]
    write_whole(folder / PROMPTS, ("\n".join(lines) + "\n").encode())


def _expect_own(file: Path, mark: str) -> None:
    """Someone's own lists may be there without a copy."""
    text = file.read_bytes().decode(errors="replace") if file.is_file() else mark
    lines = text.splitlines()[1:] if file.suffix == ".csv" else text.splitlines()
    if not all(mark in line for line in lines):
        raise UserError(
            f"{file}: was not written by `ldm scenes`, which would replace it; move it away, or "
            "name another folder with --out"
        )


def _rows(world: str, split: str, count: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(f"{world}/{split}/bad rows")
    for row in range(count):
        url, words = f"{ORIGIN}/{world}/{split}/{row:06d}.png", caption_of(world, split, row)
        bad = rng.choice(BAD_ROWS) if rng.random() < BAD_SHARE and row > 0 else None
        if bad == "duplicate":
            earlier = rng.randrange(row)
            yield f"{ORIGIN}/{world}/{split}/{earlier:06d}.png", caption_of(world, split, earlier)
        elif bad == "empty-caption":
            yield url, ""
        elif bad is not None:
            yield url.replace(".png", f".{bad}.jpg"), words
        else:
            yield url, words


def prompts(per_group: int) -> list[dict[str, Any]]:
    """The evaluation prompts: distinct, ``per_group`` each ``known``, ``new`` and ``heldout``.

    Each group has the world's own mix of ``FORMS``, so that its figures compare with the others'. A
    quarter is Chinese. ``heldout`` prompts name a held-out pair or relation, of known and new
    shapes alike; the others name none. Each carries its description for the scene reader.
    """
    groups: dict[str, tuple[tuple[str, ...], Callable[[Description], bool]]] = {
        "known": (KNOWN_SHAPES, lambda found: not found.held_out),
        "new": (SHAPES, lambda found: found.has_new_shape and not found.held_out),
        "heldout": (SHAPES, lambda found: found.held_out),
    }
    drawn: list[dict[str, Any]] = []
    for group, (shapes, wanted) in groups.items():
        rng = random.Random(f"prompts/{group}")
        seen: set[Description] = set()
        while len(seen) < per_group:
            form = form_at(len(seen) * GOLDEN % 1, FORMS)
            description = _until(lambda one: one.form == form and wanted(one), rng, shapes)  # noqa: B023
            if description in seen:
                continue
            chinese = len(seen) % 4 == 3
            seen.add(description)
            drawn.append(
                {
                    "prompt": caption(description, rng, chinese),
                    "group": group,
                    "english": plain_caption(description),
                    "scene": asdict(description),
                }
            )
    return drawn


def read_description(value: dict[str, Any]) -> Description:
    """The :class:`Description` written by :func:`prompts`."""
    second = Kind(**value["second"]) if value["second"] else None
    return Description(**{**value, "first": Kind(**value["first"]), "second": second})


def _until(
    wanted: Callable[[Description], bool],
    rng: random.Random,
    shapes: tuple[str, ...],
    forms: Mapping[str, float] = FORMS,
) -> Description:
    while True:
        description = describe(rng, shapes, forms)
        if wanted(description):
            return description
