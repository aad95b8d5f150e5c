"""What a row of a list became, and which models were trained on it: for takedowns."""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ldm.config import Params
from ldm.errors import UserError
from ldm.image_shards import SPLITS
from ldm.ingest.rows import ascii_url, key_of, read_list
from ldm.latents import IDS, TEXTS
from ldm.progress import say
from ldm.tracking.registered import trained_on

KEY = re.compile(r"[0-9a-f]{32}")


def trace(params: Params, named: str, data: Path, images: Path, latents: Path) -> None:
    """Say, a line each, where the sample of a URL, or of that key, is.

    That is rows of the lists in ``data``, shards of ``images`` and ``latents``, and versions of the
    registered model, however long ago these were trained. Raises :class:`UserError` when there is
    no trace of it.
    """
    key = named if KEY.fullmatch(named) else key_of(named)
    found = 0
    for line in _here(key, data, images, latents, params.ingest.max_caption):
        say(line)
        found += 1
    silent = []
    for version, use in trained_on(params.registry, key).items():
        if use:
            say(f"{version}: {use} it")
            found += 1
        elif use is None:
            silent.append(version)
    but = f"; not known of {', '.join(silent)}" if silent else ""
    if not found:
        raise UserError(f"{named}: no trace of it{but}")
    if silent:
        say(f"not known of {', '.join(silent)}")


def _here(key: str, data: Path, images: Path, latents: Path, max_caption: int) -> Iterator[str]:
    yield from _rows(data, key, max_caption)
    yield from _left_out(images / "skipped.csv", key)
    for path, _ in _members(images, f"{key}.json"):
        yield f"{path}: picture {key}"
    for path, about in _members(latents, f"{key}.json"):
        text = json.loads(about)["text"]
        yield f"{path}: latents {key}"
        for place, _ in _members(latents, f"{text}.{IDS}", prefix=TEXTS):
            yield f"{place}: text {text}, which other samples may share"


def _rows(data: Path, key: str, max_caption: int) -> Iterator[str]:
    paths = (data / f"{split}.csv" for split in SPLITS)
    for path in filter(Path.is_file, paths):
        for row in read_list(path, path.stem, max_caption):
            if _names(row.url, key):
                yield f"{path} row {row.number}: {row.url}"


def _left_out(path: Path, key: str) -> Iterator[str]:
    """Its picture may be in another row's sample all the same, which the reason then names."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if _names(line["url"], key):
                why = ": ".join(filter(None, (line["reason"], line["detail"])))
                yield f"{path}: row {line['row']} of {line['split']} is left out, {why}"


def _names(url: str, key: str) -> bool:
    """Whether it is a URL, and of the sample of that key."""
    return ascii_url(url) is not None and key_of(url) == key


def _members(folder: Path, name: str, prefix: str = "") -> Iterator[tuple[Path, bytes]]:
    """Shards with a member of that name, and what it holds."""
    for path in sorted(folder.glob(f"{prefix}*.tar")):
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.name == name and (content := tar.extractfile(member)):
                        yield path, content.read()
        except tarfile.TarError as error:
            raise UserError(f"{path}: damaged tar ({error}); make the shards again") from error
