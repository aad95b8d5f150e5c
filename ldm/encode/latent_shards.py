"""The shards of the latents artifact, each one unit of work: what to encode, then how to write it.

A shard of latents has the samples of the shard of pictures of its name, in their order; captions
are spread over the shards of texts by their hash. So another picture, or another caption, changes
the bytes of the shards that it is in, and of no others.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from transformers import CLIPTokenizer

from ldm.batches import parts
from ldm.encode.encoders import MIRROR
from ldm.image_shards import ImageReader
from ldm.latents import ABOUT, IDS, MIRRORED, STATES, text_key, to_npy
from ldm.shards import writing_shard
from ldm.text import tokenize

TOKENIZED = 256
"""Captions at a time."""

Read = Callable[[str], np.ndarray]
"""The result of a fingerprint."""


class Shard(Protocol):
    """A shard of the output."""

    def items(self) -> Iterator[tuple[str, bytes]]:
        """What its samples are encoded from, and a name of each for messages."""

    def write(self, fingerprints: Sequence[str], read: Read) -> None:
        """Write it, given the fingerprints of all items in their order."""


class Captions:
    """The captions that all processes find, by shard of texts; files, so that none holds them all.

    Each process has a ``rank``, and appends to files of its own.
    """

    def __init__(self, folder: Path, shards: int, rank: int) -> None:
        self.folder, self.shards, self.rank = folder, shards, rank

    def add(self, captions: Iterable[str]) -> None:
        """Note captions; the same ones may come again."""
        lines = defaultdict(list)
        for caption in captions:
            lines[self._shard_of(caption)].append(json.dumps(caption) + "\n")
        for shard, own in lines.items():
            with (self.folder / f"{shard:05d}-{self.rank}.jsonl").open("a") as file:
                file.writelines(own)

    def of(self, shard: int) -> list[str]:
        """The distinct captions of a shard that any process noted, by their keys."""
        found: set[str] = set()
        for path in self.folder.glob(f"{shard:05d}-*.jsonl"):
            with path.open() as file:
                found.update(map(json.loads, file))
        return sorted(found, key=text_key)

    def _shard_of(self, caption: str) -> int:
        """Equal parts of the range of keys."""
        return int(text_key(caption)[:8], 16) * self.shards >> 32


class PictureShard:
    """A shard of posterior moments; its captions are noted when it is written.

    ``arrays``: what each sample has (:func:`ldm.latents.arrays_of`).
    """

    def __init__(
        self, reader: ImageReader, path: Path, captions: Captions, arrays: Sequence[str]
    ) -> None:
        self.reader, self.path, self.captions, self.arrays = reader, path, captions, arrays
        self._captions: list[str] = []

    def items(self) -> Iterator[tuple[str, bytes]]:
        """The encoded pictures, each followed by its mirror image where there is one."""
        for key in self.reader:
            self._captions.append(self.reader.caption(key))
            name, picture = f"{self.path.stem} sample {key}", self.reader.picture(key)
            yield name, picture
            if MIRRORED in self.arrays:
                yield f"{name}, mirrored", MIRROR + picture
        self.reader.close()

    def write(self, fingerprints: Sequence[str], read: Read) -> None:
        """Write moments and captions."""
        by_sample = parts(fingerprints, len(self.arrays))
        rows = zip(self.reader, self._captions, by_sample, strict=True)
        with writing_shard(self.path) as write:
            for key, caption, own in rows:
                about = {"caption": caption, "text": text_key(caption)}
                content = json.dumps(about, ensure_ascii=False).encode()
                arrays = zip(self.arrays, (to_npy(read(one)) for one in own), strict=True)
                write(key, {**dict(arrays), ABOUT: content})
        self.captions.add(set(self._captions))


class TextShard:
    """A shard of text states."""

    def __init__(self, captions: Sequence[str], tokenizer: CLIPTokenizer, path: Path) -> None:
        self.captions, self.tokenizer, self.path = captions, tokenizer, path
        self._ids: list[np.ndarray] = []

    def items(self) -> Iterator[tuple[str, bytes]]:
        """The captions' int64 token ids."""
        for start in range(0, len(self.captions), TOKENIZED):
            some = self.captions[start : start + TOKENIZED]
            for caption, ids in zip(some, tokenize(self.tokenizer, some).numpy(), strict=True):
                self._ids.append(ids)
                yield f"caption {caption!r}", ids.tobytes()

    def write(self, fingerprints: Sequence[str], read: Read) -> None:
        """Write states and token ids, if there are captions."""
        if not self.captions:
            return
        with writing_shard(self.path) as write:
            for caption, ids, one in zip(self.captions, self._ids, fingerprints, strict=True):
                write(text_key(caption), {STATES: to_npy(read(one)), IDS: to_npy(ids)})
