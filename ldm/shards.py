"""Webdataset tars: written so that equal samples give equal bytes, read by index.

Members of a sample stand together as ``KEY.EXTENSION``. The reader scans the headers once and
then reads any member with one positioned read, so order is the caller's choice.
"""

from __future__ import annotations

import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldm.errors import UserError

BUFFER = 2**20
MOST_OPEN = 128
"""Files of a reader: a process has several readers, and often no more than 1,024 files."""
Numbers = Sequence[int] | np.ndarray
"""Places of samples in the order of the shards."""


@contextmanager
def writing_shard(path: Path) -> Iterator[Callable[[str, Mapping[str, bytes]], None]]:
    """Yield what appends a sample to a shard: its key, and by extension its members' contents.

    They are written sorted; the bytes are those of :mod:`tarfile`, which takes five times as long.
    """
    with path.open("wb", buffering=BUFFER) as file:
        yield partial(_append, file)
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))


def _append(file: BinaryIO, key: str, members: Mapping[str, bytes]) -> None:
    for extension in sorted(members):
        content = members[extension]
        file.write(_header(f"{key}.{extension}", len(content)))
        file.write(content)
        file.write(bytes(-len(content) % tarfile.BLOCKSIZE))


def _described(name: str, size: int) -> bytes:
    """A member's header, by the library."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


NAME, SIZE, CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 154)
"""In a header of POSIX.1-1988, section 10.1.1 (ustar)."""
NO_NAME = _described("", 0)
NO_SUM = int(NO_NAME[CHECKSUM], 8) - sum(NO_NAME[SIZE])


def _header(name: str, size: int) -> bytes:
    """The same, by what is different in each: its name, size, and the sum of all bytes."""
    encoded, octal = _to_bytes(name), b"%011o" % size
    if len(encoded) > NAME.stop or len(octal) > SIZE.stop - SIZE.start:
        return _described(name, size)
    header = bytearray(NO_NAME)
    header[: len(encoded)], header[SIZE] = encoded, octal
    header[CHECKSUM] = b"%06o" % (NO_SUM + sum(encoded) + sum(octal))
    return bytes(header)


SPAN = np.dtype([("shard", np.uint32), ("offset", np.int64), ("size", np.int64)])
"""Where a member's bytes are: shard number, offset and size in bytes."""


class ShardReader:
    """Random access, by key, to the samples of a folder's ``SHARDS-*.tar``, or of one ``NAME.tar``.

    The index is arrays: for each sample its key's bytes, 8 for its place, 20 for each member.

    Raises :class:`UserError` naming the shard when a tar is damaged, a member's extension is not
    in ``extensions``, its name has a path, or a sample is not whole or not unique.
    """

    def __init__(self, folder: Path, shards: str, extensions: frozenset[str]) -> None:
        one = shards.endswith(".tar")
        self.paths = [folder / shards] if one else sorted(folder.glob(f"{shards}-*.tar"))
        self._columns = {extension: at for at, extension in enumerate(sorted(extensions))}
        self._files: dict[int, int] = {}
        self._index(*self._scanned())

    def _scanned(self) -> list[np.ndarray]:
        """Key, column and span of every member, in the order of the shards."""
        scans = [(np.empty(0, "S1"), np.empty(0, np.uint8), np.empty(0, SPAN))]
        scans += (self._scan(shard, path) for shard, path in enumerate(self.paths))
        return [np.concatenate(parts) for parts in zip(*scans, strict=True)]

    def _scan(self, shard: int, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keys, columns, spans = [], [], []
        try:
            with tarfile.open(path, "r:") as tar:
                members: list[tarfile.TarInfo] = vars(tar)["members"]  # It would keep them all.
                while member := tar.next():
                    members.clear()
                    key, _, extension = member.name.partition(".")
                    column = self._columns.get(extension)
                    if not member.isfile() or "/" in member.name or column is None:
                        raise UserError(
                            f"{path}: unexpected member {member.name!r}; make the shards again"
                        )
                    keys.append(_to_bytes(key))
                    columns.append(column)
                    spans.append((shard, member.offset_data, member.size))
                _expect_end(path, tar)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{path}: damaged tar ({error}); make the shards again") from error
        return np.array(keys, np.bytes_), np.array(columns, np.uint8), np.array(spans, SPAN)

    def _index(self, keys: np.ndarray, columns: np.ndarray, spans: np.ndarray) -> None:
        """From members in the order of the shards to samples by sorted key."""
        self._keys, first, sample = np.unique(keys, return_index=True, return_inverse=True)
        self._order = np.argsort(first)
        shape = len(self._keys), len(self._columns)
        places = np.ravel_multi_index((sample, columns), shape)
        times = np.bincount(places, minlength=math.prod(shape))
        extensions = list(self._columns)
        if (times > 1).any():
            _, once = np.unique(places, return_index=True)
            again = np.setdiff1d(np.arange(len(places)), once)[0]
            path = self.paths[spans["shard"][again]]
            name = f"{_to_text(keys[again])}.{extensions[columns[again]]}"
            raise UserError(f"{path}: member {name!r} occurs twice; make the shards again")
        lacking = (times == 0).reshape(shape)
        if lacking.any():
            number = next(number for number in self._order if lacking[number].any())
            path = self.paths[spans["shard"][first[number]]]
            missing = ", ".join(extensions[column] for column in np.flatnonzero(lacking[number]))
            key = _to_text(self._keys[number])
            raise UserError(f"{path}: sample {key!r} lacks {missing}; make the shards again")
        self._spans = np.empty(shape, SPAN)
        self._spans.reshape(-1)[places] = spans

    @property
    def keys(self) -> list[str]:
        """All keys in the order of the shards."""
        return list(self)

    def key(self, number: int) -> str:
        """One of these, by its place."""
        return _to_text(self._keys[self._order[number]])

    def __len__(self) -> int:
        return len(self._keys)

    def numbers(self, keys: Iterable[str]) -> np.ndarray:
        """The places of these: int64 (keys,); KeyError for one that is not here."""
        return np.argsort(self._order)[np.fromiter(map(self._rank, keys), np.int64)]

    def read(self, key: str, extension: str, most: int | None = None) -> bytes:
        """One member's bytes, or the first ``most`` of them."""
        shard, offset, size = self._spans[self._rank(key), self._columns[extension]].item()
        size = size if most is None else min(most, size)
        content = os.pread(self._file(shard), size, offset)
        if len(content) != size:
            raise self._cut(shard)
        return content

    def read_each(self, numbers: Numbers, extension: str, start: bytes, rows: np.ndarray) -> None:
        """Read the members at these places into ``rows``, but for the ``start`` that all have.

        UserError that names one that starts otherwise, or is not so long.
        """
        found, length = bytearray(len(start)), len(start) + rows[:1].nbytes
        members = self._members(numbers, extension)
        for number, (shard, offset, size), row in zip(numbers, members, rows, strict=True):
            as_long = size == length
            if as_long and os.preadv(self._file(shard), (found, row), offset) != length:
                raise self._cut(shard)
            if not as_long or found != start:
                raise UserError(
                    f"{self.paths[shard]}: {self.key(number)}.{extension} is not of the shape and "
                    "type of the others; make the shards again"
                )

    def expect(self, numbers: Numbers, extension: str) -> None:
        """Have the system fetch members from disk, so that reading them then need not wait."""
        for shard, offset, size in self._members(numbers, extension):
            os.posix_fadvise(self._file(shard), offset, size, os.POSIX_FADV_WILLNEED)

    def _members(self, numbers: Numbers, extension: str) -> list[tuple[int, int, int]]:
        """Shard, offset and size of the members at these places."""
        return self._spans[self._order[numbers], self._columns[extension]].tolist()

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= MOST_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return self._files[shard]

    def _cut(self, shard: int) -> UserError:
        return UserError(f"{self.paths[shard]}: was cut short; make the shards again")

    def _rank(self, key: str) -> int:
        """A key's place among the sorted ones."""
        wanted = _to_bytes(key)
        rank = int(self._keys.searchsorted(wanted))
        if rank == len(self._keys) or self._keys[rank] != wanted:
            raise KeyError(key)
        return rank

    def close(self) -> None:
        """Let go of the files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __iter__(self) -> Iterator[str]:
        return map(_to_text, self._keys[self._order])

    def __getstate__(self) -> dict[str, object]:
        """Workers open their own files."""
        return {**self.__dict__, "_files": {}}


def _to_bytes(key: str) -> bytes:
    """A key as tarfile reads and writes it."""
    return key.encode("utf-8", "surrogateescape")


def _to_text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def _expect_end(path: Path, tar: tarfile.TarFile) -> None:
    """Tarfile takes a bad header, or the file's end after any member, for the archive's end."""
    with path.open("rb") as file:
        file.seek(tar.offset)
        rest = file.read()
    if len(rest) < 2 * tarfile.BLOCKSIZE or any(rest):
        raise tarfile.ReadError("no end where its members end")
