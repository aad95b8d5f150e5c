"""What a row of a list became, and which models were trained on it: for takedowns."""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ldm.config import Params, Registry
from ldm.errors import UserError
from ldm.image_shards import SPLITS
from ldm.ingest.rows import ascii_url, key_of, read_list
from ldm.latents import IDS, TEXTS
from ldm.progress import say
from ldm.tracking.connection import SQLITE, may_exist, tracking_uri
from ldm.tracking.registered import trained_on

KEY = re.compile(r"[0-9a-f]{32}")
Place = tuple[str, Iterator[str] | None]
"""What it is called, and what is found there, a line each; None if there is no such place."""


def trace(params: Params, named: str, data: Path, images: Path, latents: Path) -> None:
    """Say, a line each, where the sample of a URL, or of that key, is.

    That is rows of the lists in ``data`` and of ``skipped.csv`` in ``images``, shards of ``images``
    and ``latents``, and versions of the registered model, however long ago these were trained.
    What is not there is said not to have been looked into. Raises :class:`UserError`, which names
    what was, when there is no trace of it.
    """
    key = named if KEY.fullmatch(named) else key_of(named)
    uses = trained_on(params.registry, key)
    searched, found = [], 0
    for place, lines in (
        *_files(key, data, images, latents, params.ingest.max_caption),
        *_versions(params.registry, uses),
    ):
        if lines is None:
            say(f"{place}: is not there, not looked into")
            continue
        searched.append(place)
        for line in lines:
            say(line)
            found += 1
    silent = ", ".join(version for version, use in uses.items() if use is None)
    if not found:
        what = f"no trace of it in {', '.join(searched)}" if searched else "nothing was looked into"
        raise UserError(f"{named}: {what}" + (f"; not known of {silent}" if silent else ""))
    if silent:
        say(f"not known of {silent}")


def _files(key: str, data: Path, images: Path, latents: Path, max_caption: int) -> Iterator[Place]:
    for split in SPLITS:
        path = data / f"{split}.csv"
        yield str(path), _rows(path, key, max_caption) if path.is_file() else None
    skipped = images / "skipped.csv"
    yield str(skipped), _left_out(skipped, key) if skipped.is_file() else None
    for folder, what in ((images, _pictures), (latents, _latents)):
        shards = sorted(folder.glob("*.tar"))
        yield str(folder / "*.tar"), what(shards, key) if shards else None


def _rows(path: Path, key: str, max_caption: int) -> Iterator[str]:
    for row in read_list(path, path.stem, max_caption):
        if _names(row.url, key):
            yield f"{path} row {row.number}: {row.url}"


def _left_out(path: Path, key: str) -> Iterator[str]:
    """Its picture may be in another row's sample all the same, which the reason then names."""
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if _names(line["url"], key):
                why = ": ".join(filter(None, (line["reason"], line["detail"])))
                yield f"{path}: row {line['row']} of {line['split']} is left out, {why}"


def _names(url: str, key: str) -> bool:
    """Whether it is a URL, and of the sample of that key."""
    return ascii_url(url) is not None and key_of(url) == key


def _pictures(shards: Sequence[Path], key: str) -> Iterator[str]:
    for path, _ in _members(shards, f"{key}.json"):
        yield f"{path}: picture {key}"


def _latents(shards: Sequence[Path], key: str) -> Iterator[str]:
    texts = [path for path in shards if path.name.startswith(TEXTS)]
    for path, about in _members(shards, f"{key}.json"):
        text = json.loads(about)["text"]
        yield f"{path}: latents {key}"
        for place, _ in _members(texts, f"{text}.{IDS}"):
            yield f"{place}: text {text}, which other samples may share"


def _members(shards: Sequence[Path], name: str) -> Iterator[tuple[Path, bytes]]:
    """Shards with a member of that name, and what it holds."""
    for path in shards:
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.name == name and (content := tar.extractfile(member)):
                        yield path, content.read()
        except tarfile.TarError as error:
            raise UserError(f"{path}: damaged tar ({error}); make the shards again") from error


def _versions(registry: Registry, uses: Mapping[str, str | None]) -> Iterator[Place]:
    """The registered model, unless no version of it says what it was trained on."""
    at = tracking_uri(registry.tracking_uri)
    database = at.removeprefix(SQLITE)
    if not may_exist(at):
        yield database, None
    elif not uses:
        yield f"model {registry.model} in {database}", None
    elif any(use is not None for use in uses.values()):
        lines = (f"{version}: {use} it" for version, use in uses.items() if use)
        yield f"model {registry.model} in {database}", lines
