"""Pictures from a model: one prompt, or a file of prompts as a batch job."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.artifacts import write_whole
from ldm.config import Sampling
from ldm.errors import UserError
from ldm.images import encode_png
from ldm.models import locate
from ldm.progress import progress, say
from ldm.sampling import Painter, Request
from ldm.text import cut_off


@dataclass(frozen=True)
class Job:
    """What to draw besides the prompts; sizes in pixels, by default the model's own."""

    sampling: Sampling
    images_per_prompt: int = 1
    height: int | None = None
    width: int | None = None


def generate(model: str, requests: list[Request], job: Job, out: Path) -> None:
    """Draw ``images_per_prompt`` pictures a request into ``out``.

    Writes ``NNNNN.png`` and ``images.jsonl`` with what made each. Picture ``k`` of a request has
    seed ``request.seed + k``.
    """
    check(requests, job)
    painter = Painter.load(locate(model))
    painter.latent_size(job.height, job.width)
    for request in requests:
        lost = cut_off(painter.tokenizer, request.prompt)
        if lost:
            say(f"generate: prompt {request.prompt[:40]!r}...: past the limit, cut: {lost!r}")
    wanted = [
        Request(request.prompt, request.seed + k, request.negative)
        for request in requests
        for k in range(job.images_per_prompt)
    ]
    out.mkdir(parents=True, exist_ok=True)
    drawn = painter.draw(wanted, job.sampling, height=job.height, width=job.width)
    lines = []
    for number, pixels in enumerate(progress(drawn, "generate", len(wanted), "pictures")):
        name = f"{number:05d}.png"
        write_whole(out / name, encode_png(pixels))
        settings = job.sampling.model_dump(exclude={"batch_size", "seed"})
        lines.append({"file": name, **asdict(wanted[number]), **settings, "model": model})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(out / "images.jsonl", text.encode())
    say(f"generate: {len(wanted)} pictures -> {out}")


def check(requests: list[Request], job: Job) -> None:
    """Refuse what cannot be drawn, in one line."""
    if not requests:
        raise UserError("no prompts: give --prompt TEXT or --prompts FILE")
    for number, request in enumerate(requests, start=1):
        if not request.prompt.strip():
            raise UserError(f"prompt {number}: is empty; give it a text")
    if job.images_per_prompt < 1:
        raise UserError(f"--num-images {job.images_per_prompt}: must be at least 1")


def read_prompts(path: Path, seed: int) -> list[Request]:
    """Requests of a txt (a prompt a line), csv or jsonl file (prompt; optional seed, negative)."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give --prompts a txt, csv or jsonl file")
    requests = []
    for number, row in enumerate(_rows(path)):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f"{path}: row {number + 1} has no prompt")
        try:
            own_seed = int(row.get("seed") or seed + number)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}: row {number + 1}: seed {row['seed']!r} is no integer"
            ) from error
        requests.append(Request(row["prompt"], own_seed, row.get("negative") or ""))
    return requests


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: is not JSON ({error.msg})") from error
    elif path.suffix == ".txt":
        yield from ({"prompt": line} for line in path.read_text().splitlines() if line.strip())
    else:
        raise UserError(f"{path}: unknown kind of prompts file; use .txt, .csv or .jsonl")
