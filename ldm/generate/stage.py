"""Pictures from a model: a few prompts, or a file of them as a batch job.

A job is drawn part by part. A part is drawn aside and published whole, its table last; the same
command after a kill skips what is published and draws the rest, to the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ldm.artifacts import digest_file, digest_json, write_json, write_whole
from ldm.batches import parts
from ldm.device import settled_sampling
from ldm.errors import UserError
from ldm.generate.prompts import Wish, rows, wish
from ldm.images import encode_png
from ldm.locks import held
from ldm.models import digest_weights, locate
from ldm.progress import progress, say
from ldm.sampling import Painter, Request
from ldm.shards import writing_shard
from ldm.text import cut_off

Prompts = Path | list[dict[str, Any]]
"""A file, or rows: a bad one among these is an error, in a file it is skipped and listed."""

LOOSE_PART = 200
"""Rows drawn and published together where pictures are loose files."""
JOB, LOCK, TABLES, ASIDE = "job.json", ".lock", "tables", ".drawing"
IMAGES, SKIPPED = "images.jsonl", "skipped.jsonl"
WARNINGS = 10
"""Cut prompts that are told one by one; all are marked in the table."""


@dataclass(frozen=True)
class Job:
    """What to draw of every prompt; ``default`` is what a row leaves open, its prompt unused."""

    default: Wish
    images_per_prompt: int = 1
    rows_per_shard: int | None = None
    """Pack pictures into webdataset tars of as many rows; none: loose PNG files."""


@dataclass(frozen=True)
class Drawing:
    """One picture of a row: its name, what to draw, and its line of the table."""

    name: str
    request: Request
    wish: Wish
    row: int
    cut: str


def generate(
    model: str, prompts: Prompts, job: Job, out: Path | None, network: str = "ldm"
) -> None:
    """Draw every prompt ``images_per_prompt`` times into ``out``; go on where it was left off.

    Without ``out`` the job has a folder of its own in ``generated``, named by what decides it.
    Picture ``k`` of a row has the row's seed plus ``k``. Writes pictures (``NNNNN.png``, or in
    ``images-NNNNN.tar``), ``images.jsonl`` with what made each, and ``skipped.jsonl`` with the rows
    of a file that could not be drawn.
    """
    for name, value in (
        ("num-images", job.images_per_prompt),
        ("rows-per-shard", job.rows_per_shard),
    ):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    total = sum(1 for _ in _read(prompts))
    if total == 0:
        raise UserError("no prompts: give --prompt TEXT, or --prompts FILE with a row at least")
    painter = Painter.load(locate(model), network=network)
    default = replace(job.default, sampling=settled_sampling(job.default.sampling, painter.device))
    job = replace(job, default=default)
    _check(painter, job.default)
    if isinstance(prompts, list):
        for number, row in enumerate(prompts, start=1):
            try:
                _check(painter, wish(row, job.default))
            except UserError as error:
                raise UserError(f"prompt {number}: {error}") from error
    identity = _identity(painter, prompts, job, network)
    out = out or Path("generated") / digest_json(identity)[:8]
    with _claimed(out, identity):
        if not (out / IMAGES).is_file():
            _draw(painter, prompts, job, out, total)
            _finish(out)
        shutil.rmtree(out / TABLES, ignore_errors=True)
    drawn, skipped = (_lines(out / name) for name in (IMAGES, SKIPPED))
    told = f", {skipped} rows skipped, see {SKIPPED}" if skipped else ""
    if not drawn:
        raise UserError(f"{prompts}: none of its {total} rows can be drawn; see {out / SKIPPED}")
    say(f"generate: {drawn} pictures{told} -> {out}")


def _check(painter: Painter, asked: Wish) -> None:
    """Refuse sizes and steps that the model's autoencoder and schedule cannot do."""
    painter.latent_size(asked.height, asked.width)
    painter.sampler(asked.sampling)


def _read(prompts: Prompts) -> Iterable[dict[str, Any] | None]:
    return rows(prompts) if isinstance(prompts, Path) else prompts


def _identity(painter: Painter, prompts: Prompts, job: Job, network: str) -> dict[str, Any]:
    """All that decides the pictures."""
    wished = {key: value for key, value in asdict(job.default).items() if key != "sampling"}
    return {
        "unet": digest_weights(painter.unet),
        "vae": digest_weights(painter.vae),
        "text_encoder": digest_weights(painter.text_encoder),
        "tokenizer": digest_json(painter.tokenizer.get_vocab()),
        "schedule": digest_json(painter.schedule),
        "network": network,
        "prompts": digest_file(prompts) if isinstance(prompts, Path) else digest_json(prompts),
        "images_per_prompt": job.images_per_prompt,
        "rows_per_shard": job.rows_per_shard,
        **job.default.sampling.as_dict(),
        **wished,
    }


@contextmanager
def _claimed(out: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold ``out`` for this job; pictures of another are never mixed with or replaced."""
    out.mkdir(parents=True, exist_ok=True)
    found = {path.name for path in out.iterdir()}
    if JOB not in found and found - {LOCK, f".{JOB}.writing"}:  # Of others: not even a lock.
        raise UserError(f"{out}: is not empty; give another --out")
    with held(out / LOCK, f"{out}: another process draws into it; wait for it"):
        if not (out / JOB).is_file():
            write_json(out / JOB, identity)
        known = json.loads((out / JOB).read_text())
        other = sorted(key for key in identity if known.get(key) != identity[key])
        if other:
            raise UserError(
                f"{out}: holds pictures of another job (other {', '.join(other)}); give another "
                "--out, or remove it"
            )
        yield


def _draw(painter: Painter, prompts: Prompts, job: Job, out: Path, total: int) -> None:
    (out / TABLES).mkdir(exist_ok=True)
    size = job.rows_per_shard or LOOSE_PART
    digits = max(5, len(str(total * job.images_per_prompt - 1)))
    bar = progress((), "generate", total * job.images_per_prompt, "pictures")
    warned = 0
    for part, numbered in enumerate(parts(enumerate(_read(prompts)), size)):
        table = out / TABLES / f"part-{part:06d}.jsonl"
        if not table.is_file():
            drawings, skipped = _plan(painter, numbered, job, digits)
            for drawing in [one for one in drawings if one.cut][: WARNINGS - warned]:
                warned += 1
                where = f"row {drawing.row + 1}: past the limit of the tokenizer"
                say(f"generate: {where}, cut: {drawing.cut!r}")
            _draw_part(painter, drawings, out, part, job.rows_per_shard, bar)
            lines = [_line(drawing) for drawing in drawings] + skipped
            write_whole(table, "".join(_json(line) for line in lines).encode())
            bar.update(len(skipped) * job.images_per_prompt)
        else:
            bar.update(len(numbered) * job.images_per_prompt)
    bar.close()


def _plan(
    painter: Painter, numbered: list[tuple[int, dict[str, Any] | None]], job: Job, digits: int
) -> tuple[list[Drawing], list[dict[str, Any]]]:
    """The pictures of some rows, and a line for each row that cannot be drawn."""
    drawings, skipped = [], []
    fine = set()  # A sampler is made to check its settings: once for each, not for every row.
    for row, content in numbered:
        try:
            asked = wish(content, job.default)
            if (settings := (asked.sampling, asked.height, asked.width)) not in fine:
                _check(painter, asked)
                fine.add(settings)
        except UserError as error:
            skipped.append({"row": row + 1, "skipped": str(error)})
            continue
        cut = cut_off(painter.tokenizer, asked.prompt)
        for k in range(job.images_per_prompt):
            name = f"{row * job.images_per_prompt + k:0{digits}d}"
            request = Request(asked.prompt, asked.seed + k, asked.negative)
            drawings.append(Drawing(name, request, asked, row, cut))
    return drawings, skipped


def _draw_part(
    painter: Painter, drawings: list[Drawing], out: Path, part: int, sharded: int | None, bar: Any
) -> None:
    """Draw aside, then move into place: loose files, or one shard."""
    aside = out / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    groups: dict[Any, list[Drawing]] = {}
    for one in drawings:
        groups.setdefault((one.wish.sampling, one.wish.height, one.wish.width), []).append(one)
    for (sampling, height, width), group in groups.items():
        requests = [one.request for one in group]
        drawn = painter.draw(requests, sampling, height=height, width=width)
        for one, pixels in zip(group, drawn, strict=True):
            write_whole(aside / f"{one.name}.png", encode_png(pixels))
            bar.update()
    if not sharded:
        for one in drawings:
            (aside / f"{one.name}.png").replace(out / f"{one.name}.png")
    elif drawings:
        packed = aside / f"images-{part:05d}.tar"
        with writing_shard(packed) as append:
            for one in drawings:
                picture = (aside / f"{one.name}.png").read_bytes()
                append(one.name, {"png": picture, "json": _json(_line(one)).encode()})
        packed.replace(out / packed.name)
    shutil.rmtree(aside)


def _line(one: Drawing) -> dict[str, Any]:
    """What made a picture, and under ``extra`` the other columns of its row."""
    settings = one.wish.sampling.model_dump(exclude={"batch_size", "seed"})
    size = {"height": one.wish.height, "width": one.wish.width}
    line = {
        "file": f"{one.name}.png",
        "row": one.row + 1,
        **asdict(one.request),
        **settings,
        **size,
    }
    line |= {"cut": one.cut} if one.cut else {}
    return line | ({"extra": one.wish.extra} if one.wish.extra else {})


def _json(line: dict[str, Any]) -> str:
    # Parquet has dates and decimals.
    return json.dumps(line, ensure_ascii=False, default=str) + "\n"


def _finish(out: Path) -> None:
    """Join the parts' tables, line by line; the table of pictures last, as the job's end."""
    for name, drawn in ((SKIPPED, False), (IMAGES, True)):
        aside = out / f".{name}"
        with aside.open("w", encoding="utf-8") as joined:
            for table in sorted((out / TABLES).iterdir()):
                with table.open(encoding="utf-8") as lines:
                    joined.writelines(one for one in lines if ("file" in json.loads(one)) == drawn)
            joined.flush()
            os.fsync(joined.fileno())
        aside.replace(out / name)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
