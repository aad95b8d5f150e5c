"""Pictures from a model: a few prompts, or a file of them as a batch job.

A job is drawn part by part. A part is drawn aside and published whole, its table last; the same
command after a kill skips what is published and draws the rest, to the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ldm.artifacts import digest_file, digest_json, write_json, write_whole
from ldm.errors import UserError
from ldm.images import encode_png
from ldm.models import digest_weights, locate
from ldm.progress import progress, say
from ldm.prompts import Wish, rows, wish
from ldm.sampling import Painter, Request
from ldm.shards import ShardWriter
from ldm.text import cut_off

Prompts = Path | list[dict[str, Any]]
"""A file, or rows: a bad one among these is an error, in a file it is skipped and listed."""
Item = TypeVar("Item")

LOOSE_PART = 200
"""Rows drawn and published together where pictures are loose files."""
JOB, TABLES, ASIDE = "job.json", "tables", ".drawing"
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
    if job.images_per_prompt < 1:
        raise UserError(f"--num-images {job.images_per_prompt}: must be at least 1")
    total = sum(1 for _ in _read(prompts))
    if total == 0:
        raise UserError("no prompts: give --prompt TEXT, or --prompts FILE with a row at least")
    if isinstance(prompts, list):
        for row in prompts:
            wish(row, job.default)
    painter = Painter.load(locate(model), network=network)
    painter.latent_size(job.default.height, job.default.width)
    identity = _identity(painter, prompts, job)
    out = out or Path("generated") / digest_json(identity)[:8]
    _claim(out, identity)
    if not (out / IMAGES).is_file():
        _draw(painter, prompts, job, out, total)
        _finish(out)
    drawn, skipped = (_lines(out / name) for name in (IMAGES, SKIPPED))
    told = f", {skipped} rows skipped, see {SKIPPED}" if skipped else ""
    if not drawn:
        raise UserError(f"{prompts}: none of its {total} rows can be drawn; see {out / SKIPPED}")
    say(f"generate: {drawn} pictures{told} -> {out}")


def _read(prompts: Prompts) -> Iterable[dict[str, Any] | None]:
    return rows(prompts) if isinstance(prompts, Path) else prompts


def _identity(painter: Painter, prompts: Prompts, job: Job) -> dict[str, Any]:
    """All that decides the pictures."""
    return {
        "unet": digest_weights(painter.unet),
        "vae": digest_weights(painter.vae),
        "text_encoder": digest_weights(painter.text_encoder),
        "prompts": digest_file(prompts) if isinstance(prompts, Path) else digest_json(prompts),
        "images_per_prompt": job.images_per_prompt,
        "rows_per_shard": job.rows_per_shard,
        **{key: value for key, value in asdict(job.default).items() if key != "sampling"},
        **job.default.sampling.as_dict(),
    }


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Make ``out`` this job's; pictures of another are never mixed with or replaced."""
    if (out / JOB).is_file():
        known = json.loads((out / JOB).read_text())
        other = sorted(key for key in identity if known.get(key) != identity[key])
        if other:
            raise UserError(
                f"{out}: holds pictures of another job (other {', '.join(other)}); give another "
                "--out, or remove it"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; give another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / JOB, identity)


def _draw(painter: Painter, prompts: Prompts, job: Job, out: Path, total: int) -> None:
    (out / TABLES).mkdir(exist_ok=True)
    size = job.rows_per_shard or LOOSE_PART
    digits = max(5, len(str(total * job.images_per_prompt - 1)))
    bar = progress((), "generate", total * job.images_per_prompt, "pictures")
    warned = 0
    for part, numbered in enumerate(_parts(enumerate(_read(prompts)), size)):
        table = out / TABLES / f"part-{part:06d}.jsonl"
        if not table.is_file():
            drawings, skipped = _plan(painter, numbered, job, digits)
            for drawing in [one for one in drawings if one.cut][: WARNINGS - warned]:
                warned += 1
                where = f"row {drawing.row + 1}: past the limit of the tokenizer"
                say(f"generate: {where}, cut: {drawing.cut!r}")
            _draw_part(painter, drawings, out, part, job.rows_per_shard, bar)
            lines = [_line(drawing) for drawing in drawings] + skipped
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_whole(table, text.encode())
            bar.update(len(skipped) * job.images_per_prompt)
        else:
            bar.update(len(numbered) * job.images_per_prompt)
    bar.close()


def _parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def _plan(
    painter: Painter, numbered: list[tuple[int, dict[str, Any] | None]], job: Job, digits: int
) -> tuple[list[Drawing], list[dict[str, Any]]]:
    """The pictures of some rows, and a line for each row that cannot be drawn."""
    drawings, skipped = [], []
    for row, content in numbered:
        try:
            asked = wish(content, job.default)
            painter.latent_size(asked.height, asked.width)
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
    if sharded:
        with ShardWriter(aside, "shard", max(1, len(drawings))) as shard:
            for one in drawings:
                about = json.dumps(_line(one), ensure_ascii=False).encode()
                picture = (aside / f"{one.name}.png").read_bytes()
                shard.write(one.name, {"png": picture, "json": about})
        if drawings:
            (aside / "shard-00000.tar").replace(out / f"images-{part:05d}.tar")
    else:
        for one in drawings:
            (aside / f"{one.name}.png").replace(out / f"{one.name}.png")
    shutil.rmtree(aside)


def _line(one: Drawing) -> dict[str, Any]:
    settings = one.wish.sampling.model_dump(exclude={"batch_size", "seed"})
    size = {"height": one.wish.height, "width": one.wish.width}
    line = {
        "file": f"{one.name}.png",
        "row": one.row + 1,
        **asdict(one.request),
        **settings,
        **size,
    }
    return {**one.wish.extra, **line, **({"cut": one.cut} if one.cut else {})}


def _finish(out: Path) -> None:
    """Join the parts' tables, line by line; the table of pictures last, as the job's end."""
    for name, wanted in ((SKIPPED, True), (IMAGES, False)):
        aside = out / f".{name}"
        with aside.open("w", encoding="utf-8") as joined:
            for table in sorted((out / TABLES).iterdir()):
                with table.open(encoding="utf-8") as file:
                    joined.writelines(
                        line for line in file if ("skipped" in json.loads(line)) == wanted
                    )
        aside.replace(out / name)
    shutil.rmtree(out / TABLES)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
