"""Artifacts at a URL: fetched before a stage reads them, published after it wrote them.

Under the URL lie ``manifest.json``, the artifact's byte for byte, and ``files/SHA256``, each file
under the name of its content. So a file never changes once it is there, and what is there is not
sent again. To publish is to send the files that are not there, then the manifest in one put, then
to delete what it does not list. Until the manifest is put, the artifact is the one before, whole;
who is still fetching that one finds a file gone, and goes on with the new manifest. One process
publishes to a URL at a time.

What is read is fetched whole to ``runs/remote``, and the stages see a folder as ever. The price is
its room on disk and the wait before the first step. Reading ranges where they lie would spare both,
but a training reads each sample many times, in an order of its own, at a request each time; and
only all of an artifact's bytes tell that it is what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from ldm.artifacts import MANIFEST, Manifest, digest_file, write_whole
from ldm.errors import UserError
from ldm.locks import held
from ldm.progress import say
from ldm.remote.bucket import Bucket, each
from ldm.remote.copies import Copies

Location = Path | str
"""A folder, or a URL that fsspec understands: ``s3://bucket/latents``."""

FILES, REMOTE = "files", "remote"
SHA256 = re.compile(r"[0-9a-f]{64}")


@contextmanager
def reading(at: Location, runs: Path, *, files: bool = True) -> Iterator[Path]:
    """Yield the artifact's folder; of a URL, a copy below ``runs/remote``, right to the byte.

    Only files that no copy has are fetched. This one stays as it is until the block ends, whoever
    publishes anew meanwhile. With ``files=False`` it may hold the manifest alone. Raises
    :class:`UserError` when there is no whole artifact at the URL or it cannot be fetched.
    """
    if isinstance(at, Path):
        yield at
        return
    bucket, copies = Bucket(at), _copies(at, runs)
    with ExitStack() as until_read:
        with copies.alone():
            copy = _fetch(bucket, copies, files)
            until_read.enter_context(copies.in_use(copy))
            copies.keep_only(copy)
        yield copy


@contextmanager
def publishing(at: Location, kind: str, runs: Path) -> Iterator[Path]:
    """Yield where to write an artifact of that kind; to a URL it is sent when the block ends.

    The store is asked before the block runs. Raises :class:`UserError` when it cannot be reached,
    holds an artifact of another kind at the URL, or another process publishes there; what was
    written then stays in ``runs/remote``.
    """
    if isinstance(at, Path):
        yield at
        return
    bucket, copies = Bucket(at), _copies(at, runs)
    with held(copies.folder / "publishing", f"{at}: another process makes it; wait for it"):
        before = _published(bucket)
        if before is not None and (other := _manifest(before, at).kind) != kind:
            raise UserError(f"{at}: holds {other!r}, not {kind!r}; give another URL")
        made = copies.folder / kind
        yield made
        sent, total = _publish(bucket, made, before)
        copies.adopt(made)
    say(f"published: {sent} of {total} files sent, the rest was there -> {at}")


def _copies(url: str, runs: Path) -> Copies:
    name = f"{PurePosixPath(url).name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    return Copies(runs / REMOTE / name)


def _published(bucket: Bucket) -> bytes | None:
    """The manifest; None in a bucket without one."""
    try:
        return bucket.read(MANIFEST)
    except FileNotFoundError:
        _sizes(bucket)
        return None


def _sizes(bucket: Bucket) -> dict[str, int]:
    """Bytes by sha256 of the files that are there, listed or not; what is not ours is left out."""
    try:
        sizes = bucket.sizes(FILES)
    except FileNotFoundError as error:
        raise UserError(f"{error}; make the bucket, or mend the URL") from error
    return {name: size for name, size in sizes.items() if SHA256.fullmatch(name)}


def _manifest(content: bytes, url: str) -> Manifest:
    """The manifest in these bytes, which may be anyone's: no file of it lies outside its folder."""
    try:
        manifest = Manifest(**json.loads(content))
        for name, digest in manifest.files.items():
            path = PurePosixPath(name)
            inside = not path.is_absolute() and ".." not in path.parts and str(path) == name
            if not inside or name in {".", MANIFEST} or not SHA256.fullmatch(digest):
                raise ValueError(f"lists {name!r} as {digest!r}")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{url}/{MANIFEST}: is no artifact's manifest ({error}); mend the URL"
        ) from error
    return manifest


def _fetch(bucket: Bucket, copies: Copies, files: bool) -> Path:
    """A whole copy of what is published, or of its manifest."""
    content = _published(bucket)
    if content is None:
        raise UserError(f"{bucket.url}: holds no {MANIFEST}; publish it, or mend the URL")
    copy, manifest = copies.of(content), _manifest(content, bucket.url)
    copy.mkdir(parents=True, exist_ok=True)
    write_whole(copy / MANIFEST, content)
    try:
        if files:
            _fetch_files(bucket, copies.files(), copy, manifest.files)
    except FileNotFoundError as error:
        if _published(bucket) != content:  # Published anew meanwhile.
            return _fetch(bucket, copies, files)
        raise UserError(f"{error}; publish the artifact again") from error
    return copy


def _fetch_files(
    bucket: Bucket, known: Mapping[str, Path], copy: Path, files: Mapping[str, str]
) -> None:
    """Make a copy hold exactly ``files``, sha256 by name; take over what is ``known``."""
    for path in copy.rglob("*"):
        if path.is_file() and path.relative_to(copy).as_posix() not in {*files, MANIFEST}:
            path.unlink()

    def fetch(name: str) -> None:
        path, digest = copy / name, files[name]
        if _is(path, digest):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.writing")
        if digest in known and _is(known[digest], digest):
            os.link(known[digest], aside)
        else:
            _fetch_file(bucket, digest, aside, name)
        aside.replace(path)

    each(fetch, sorted(files), f"fetch {copy.parent.name}")


def _fetch_file(bucket: Bucket, digest: str, path: Path, name: str) -> None:
    bucket.fetch(f"{FILES}/{digest}", path)
    if not _is(path, digest):
        raise UserError(
            f"{bucket.url}/{FILES}/{digest}: is not what was published as {name}; "
            "delete it there and publish the artifact again"
        )


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and digest_file(path) == digest


def _publish(bucket: Bucket, made: Path, before: bytes | None) -> tuple[int, int]:
    """Send what is not there, then the manifest; files sent, files in all."""
    content = (made / MANIFEST).read_bytes()
    files = _manifest(content, str(made)).files
    paths = {digest: made / name for name, digest in files.items()}
    lacking = _lacking(bucket, paths)
    each(lambda digest: bucket.send(paths[digest], f"{FILES}/{digest}"), lacking, "publish")
    if _lacking(bucket, paths) or _published(bucket) != before:
        raise UserError(f"{bucket.url}: another process published there; run it again, alone")
    if content != before:
        bucket.write(MANIFEST, content)
    if unlisted := sorted(_sizes(bucket).keys() - paths.keys()):
        bucket.delete([f"{FILES}/{digest}" for digest in unlisted])
    return len(lacking), len(paths)


def _lacking(bucket: Bucket, paths: Mapping[str, Path]) -> list[str]:
    """Which files are not there, or not of their size."""
    there = _sizes(bucket)
    return [digest for digest, path in paths.items() if there.get(digest) != path.stat().st_size]
