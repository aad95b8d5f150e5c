"""Shards that are cut at keys, not at counts, so that a change of the list stays where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ldm.shards import writing_shard

Keys = Sequence[str] | np.ndarray
"""Strings, or bytes of one length."""
Sample = Callable[[], Mapping[str, bytes]]
"""Reads a sample's members by extension."""


def cut(keys: Keys, most: int) -> Iterator[range]:
    """Cut a sequence into parts of at most ``most``, half as many on average; indices, in order.

    A part that is too long is cut before its smallest key. Keys are evenly spread and distinct.
    Where a cut is depends on the keys around it alone (they are the upper levels of a treap; Seidel
    and Aragon, "Randomized Search Trees", 1996). So a key that comes or goes changes the part it is
    in and at most one beside it, which two may be cut anew; all others stay as they were.
    """
    waiting = [range(len(keys))] if len(keys) else []
    while waiting:
        part = waiting.pop()
        if len(part) <= most:
            yield part
        else:
            at = min(part[1:], key=keys.__getitem__)
            waiting += [range(at, part.stop), range(part.start, at)]


class CutShards:
    """Writes ``PREFIX-00000.tar``, ... of what becomes of some candidates, sorted by key in each.

    Which candidates fall together is known before; a shard of which nothing is left is not written.
    """

    def __init__(self, folder: Path, prefix: str, candidates: Keys, most: int) -> None:
        self.folder, self.prefix = folder, prefix
        self._ends = (part.stop for part in cut(candidates, most))
        self._end = next(self._ends, 0)
        self._samples: dict[str, Sample] = {}
        self._put = self._shards = 0

    def put(self, candidate: str, sample: Sample | None) -> None:
        """Hand in the next candidate's sample, or nothing."""
        if sample is not None:
            self._samples[candidate] = sample
        self._put += 1
        if self._put < self._end:
            return
        self._end = next(self._ends, 0)
        if self._samples:
            with writing_shard(self.folder / f"{self.prefix}-{self._shards:05d}.tar") as append:
                for key in sorted(self._samples):
                    append(key, self._samples[key]())
            self._samples = {}
            self._shards += 1
