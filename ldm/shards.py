"""Webdataset tars: written so that equal samples give equal bytes, read by index.

Members of a sample stand together as ``KEY.EXTENSION``. The reader scans the headers once and
then reads any member with one positioned read, so order is the caller's choice.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ldm.errors import UserError


class ShardWriter:
    """Writes samples into ``PREFIX-00000.tar``, ``PREFIX-00001.tar``, ... with fixed metadata."""

    def __init__(self, folder: Path, prefix: str, samples_per_shard: int) -> None:
        self.folder, self.prefix, self.samples_per_shard = folder, prefix, samples_per_shard
        self.samples = 0
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample; ``members`` maps extensions to contents, kept in sorted order."""
        if self.samples % self.samples_per_shard == 0:
            self._close()
            name = f"{self.prefix}-{self.samples // self.samples_per_shard:05d}.tar"
            self._tar = _new_tar(self.folder / name)
        assert self._tar is not None
        _append(self._tar, key, members)
        self.samples += 1

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None


@contextmanager
def writing_shard(path: Path) -> Iterator[Callable[[str, Mapping[str, bytes]], None]]:
    """Yield what appends one sample, as :meth:`ShardWriter.write` does, to a shard of this name."""
    with _new_tar(path) as tar:
        yield lambda key, members: _append(tar, key, members)


def _new_tar(path: Path) -> tarfile.TarFile:
    return tarfile.TarFile(path, "w", format=tarfile.USTAR_FORMAT)


def _append(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    for extension in sorted(members):
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size, info.mtime, info.mode = len(members[extension]), 0, 0o644
        tar.addfile(info, io.BytesIO(members[extension]))


@dataclass(frozen=True)
class Span:
    """Where a member's bytes are: shard number, offset and size in bytes."""

    shard: int
    offset: int
    size: int


class ShardReader:
    """Random access to the samples of a folder's ``PREFIX-*.tar``, by key, or of ``only`` one.

    Raises :class:`UserError` naming the shard when a tar is damaged, a member's extension is not
    in ``extensions``, its name has a path, or a sample is not whole or not unique.
    """

    def __init__(
        self, folder: Path, prefix: str, extensions: frozenset[str], only: str | None = None
    ) -> None:
        self.paths = [folder / only] if only else sorted(folder.glob(f"{prefix}-*.tar"))
        self._members: dict[str, dict[str, Span]] = {}
        for shard, path in enumerate(self.paths):
            self._scan(shard, path, extensions)
        for key, members in self._members.items():
            if members.keys() != extensions:
                missing = ", ".join(sorted(extensions - members.keys()))
                path = self.paths[next(iter(members.values())).shard]
                raise UserError(f"{path}: sample {key!r} lacks {missing}; make the shards again")
        self._files: dict[int, int] = {}

    def _scan(self, shard: int, path: Path, extensions: frozenset[str]) -> None:
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    if not member.isfile() or "/" in member.name or extension not in extensions:
                        raise UserError(f"{path}: unexpected member {member.name!r}")
                    spans = self._members.setdefault(key, {})
                    if extension in spans:
                        raise UserError(f"{path}: member {member.name!r} occurs twice")
                    spans[extension] = Span(shard, member.offset_data, member.size)
                _expect_end(path, tar)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{path}: damaged tar ({error}); make the shards again") from error

    @property
    def keys(self) -> list[str]:
        """All keys in the order of the shards."""
        return list(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def read(self, key: str, extension: str) -> bytes:
        """One member's bytes."""
        span = self._members[key][extension]
        if span.shard not in self._files:
            self._files[span.shard] = os.open(self.paths[span.shard], os.O_RDONLY)
        content = os.pread(self._files[span.shard], span.size, span.offset)
        if len(content) != span.size:
            raise UserError(f"{self.paths[span.shard]}: was cut short; make the shards again")
        return content

    def close(self) -> None:
        """Let go of the files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __getstate__(self) -> dict[str, object]:
        """Workers open their own files."""
        return {**self.__dict__, "_files": {}}


def _expect_end(path: Path, tar: tarfile.TarFile) -> None:
    """Tarfile takes a bad header, or the file's end after any member, for the archive's end."""
    with path.open("rb") as file:
        file.seek(tar.offset)
        rest = file.read()
    if len(rest) < 2 * tarfile.BLOCKSIZE or any(rest):
        raise tarfile.ReadError("no end where its members end")
