"""Output directories that say what they are, written whole or not at all.

A stage fills a hidden sibling of its output, writes ``manifest.json`` last and renames the lot
into place. The next stage opens the directory through its manifest and checks every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.errors import UserError, full_disk_told
from ldm.locks import held

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
Write = Callable[..., AbstractContextManager[Path]]
"""What :func:`writing` is, but for the target."""


@dataclass(frozen=True)
class Manifest:
    """What a directory holds and what made it. No times, no paths, no host: same input, same bytes.

    ``inputs`` maps a name (``images``, ``vae``) to the digest of what was read; ``files`` maps
    each relative path to its sha256.
    """

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, int]
    files: dict[str, str]
    made_by: str = f"ldm {__version__}"
    schema_version: int = SCHEMA_VERSION
    path: Path = field(default=Path(), compare=False)

    @property
    def digest(self) -> str:
        """sha256 over the files' names and hashes: equal for equal content."""
        return digest_json(self.files)


def digest_json(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_tree(root: Path) -> dict[str, str]:
    """sha256 of every file under ``root`` by relative path, sorted, without the manifest."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): digest_file(path)
        for path in files
        if path.relative_to(root).as_posix() != MANIFEST
    }


@contextmanager
def writing(
    target: Path,
    kind: str,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    counts: dict[str, int] | None = None,
) -> Iterator[Path]:
    """Yield an empty directory that becomes ``target`` when the block ends without an error.

    ``counts`` is read at the end, so the block may fill it. On an error nothing is left behind
    and an earlier ``target`` stays as it was; behind a link what that leads to is replaced.
    UserError while another process makes it, and where anything but an earlier one of its ``kind``
    is there.
    """
    with making(target, kind) as write, write(config=config, inputs=inputs, counts=counts) as fresh:
        yield fresh


@contextmanager
def making(target: Path, kind: str) -> Iterator[Write]:
    """Be the one process that makes ``target`` while the block runs; yield what writes it.

    For those who work for long before they write. UserError as of :func:`writing`.
    """
    expect_replaceable(target, kind)
    target = target.resolve() if target.is_symlink() else target
    lock = target.with_name(f".{target.name}.lock")
    with held(lock, f"{target}: another process makes it; wait for it, or stop it"):
        yield partial(_writing, target, kind)


def expect_replaceable(target: Path, kind: str) -> None:
    """UserError where something else than an earlier output of that ``kind`` would be lost.

    And where nothing can be written. For those who look before they work for long.
    """
    remedy = "give another --out, or move that away"
    place = next(one for one in target.absolute().parents if one.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(f"{target}: cannot be made in {place}; give another --out, or see to that")
    if not target.name:
        raise UserError(f"{target}: cannot be replaced by a folder; give another --out")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; {remedy}")
    if not target.is_dir() or not any(target.iterdir()):
        return
    try:
        found = manifest_of(target)
    except UserError:
        return  # A damaged one is to be made again.
    if found is None:
        raise UserError(f"{target}: has files, and no {MANIFEST} that says of what; {remedy}")
    if found.kind != kind:
        raise UserError(f"{target}: holds {found.kind!r}, not {kind!r}; {remedy}")


@contextmanager
def _writing(
    target: Path,
    kind: str,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    counts: dict[str, int] | None = None,
) -> Iterator[Path]:
    """:func:`writing`, where nobody else does."""
    fresh = target.parent / f".{target.name}.writing"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        with full_disk_told(target):
            yield fresh
        manifest = Manifest(kind, dict(config), dict(inputs), counts or {}, digest_tree(fresh))
        content = {key: value for key, value in asdict(manifest).items() if key != "path"}
        write_json(fresh / MANIFEST, content)
        _swap_in(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap_in(fresh: Path, target: Path) -> None:
    """Rename ``fresh`` to ``target``; a directory can't replace a full one, so that steps aside."""
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def manifest_of(path: Path, remedy: str = "make it") -> Manifest | None:
    """What a directory says that it holds; None where it does not say.

    Unverified: for those who need not read the files, of which there may be terabytes.
    """
    if not (path / MANIFEST).is_file():
        return None
    try:
        return Manifest(**json.loads((path / MANIFEST).read_text()), path=path)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / MANIFEST}: cannot be read ({error}); {remedy} again") from error


def opening(
    path: Path, kind: str, made_by_stage: str, *, rank: int = 0, processes: int = 1
) -> Manifest:
    """Read and verify the directory of that ``kind``; of several ``processes`` each a share.

    Raises :class:`UserError` when it is missing, unfinished, of another kind or schema, or when a
    file is missing, added or altered; the message names ``made_by_stage`` as the remedy.
    """
    remedy = f"run `ldm {made_by_stage}` to make it"
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; {remedy}")
    manifest = manifest_of(path, remedy)
    if manifest is None:
        raise UserError(f"{path}: has no {MANIFEST}, so it is unfinished or not ours; {remedy}")
    if (manifest.kind, manifest.schema_version) != (kind, SCHEMA_VERSION):
        raise UserError(
            f"{path}: holds {manifest.kind!r} of schema {manifest.schema_version}, "
            f"not {kind!r} of schema {SCHEMA_VERSION}; {remedy}"
        )
    _verify_files(path, manifest.files, remedy, slice(rank, None, processes))
    return manifest


def _verify_files(path: Path, expected: Mapping[str, str], remedy: str, share: slice) -> None:
    found = {name.relative_to(path).as_posix() for name in path.rglob("*") if name.is_file()}
    for name in sorted(expected.keys() | (found - {MANIFEST})):
        if name not in found:
            raise UserError(f"{path / name}: is missing; {remedy} again")
        if name not in expected:
            raise UserError(f"{path / name}: is not in the manifest; {remedy} again")
    for name in sorted(expected)[share]:
        if expected[name] != digest_file(path / name):
            raise UserError(f"{path / name}: is not what was written; {remedy} again")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, keys in the given order, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file aside, sync it and rename it into place; UserError if the disk is full."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        with full_disk_told(path), aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
