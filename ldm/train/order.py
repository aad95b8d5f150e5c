"""Which sample each position of a run shows: all as often, and those of a step of one shape.

The samples of a shape are a bucket, an endless stream of one shuffle after the other, cut into
batches. After ``e`` epochs a bucket of ``n`` samples has shown ``e n / B`` batches of ``B``,
rounded: what does not fill a batch goes into a later epoch's. An epoch's batches come in random
order, but those of a bucket in the order of its stream.

So two samples of a bucket are never more than one showing apart, and at the end of an epoch a
bucket is at most half a batch ahead of its share or behind it. A bucket of fewer samples than a
batch repeats them in it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from ldm.train.draws import BUCKETS, ORDER, counter_based


def by_shape(shapes: np.ndarray) -> list[np.ndarray]:
    """Integers (samples, dimensions) to the samples' numbers by shape: ascending, int64 (some,)."""
    kinds, kind_of = np.unique(shapes, axis=0, return_inverse=True)
    return [np.flatnonzero(kind_of == kind) for kind in range(len(kinds))]


class Order:
    """The sample of every position, in steps of ``batch_size`` positions.

    ``shapes`` are the samples', integers (samples, dimensions). Where all are the same, position
    ``p`` of ``n`` samples shows number ``p % n`` of shuffle ``p // n``, whatever the batch size.
    What was asked before plays no part.
    """

    def __init__(self, shapes: np.ndarray, seed: int, batch_size: int) -> None:
        self.seed, self.batch_size = seed, batch_size
        groups = by_shape(shapes)
        self._streams = [_Stream(group, seed, bucket) for bucket, group in enumerate(groups)]
        self._sizes = [len(group) for group in groups]
        self._epoch = self._plan(0)

    def sample(self, position: int) -> int:
        """The number of the sample that a position shows."""
        step, place = divmod(position, self.batch_size)
        if step not in self._epoch.steps:
            self._epoch = self._plan(self._epoch_of(step))
        at = step - self._epoch.steps.start
        bucket, batch = int(self._epoch.buckets[at]), int(self._epoch.batches[at])
        return self._streams[bucket].sample(batch * self.batch_size + place)

    def _batches_before(self, epoch: int) -> list[int]:
        """How many of each bucket the epochs before this one show; exact, as integers are."""
        whole = 2 * self.batch_size
        return [(2 * epoch * size + self.batch_size) // whole for size in self._sizes]

    def _epoch_of(self, step: int) -> int:
        beyond = (step + len(self._sizes)) * self.batch_size // sum(self._sizes) + 2
        starts = range(beyond)
        return bisect_right(starts, step, key=lambda epoch: sum(self._batches_before(epoch))) - 1

    def _plan(self, epoch: int) -> _Epoch:
        first, end = self._batches_before(epoch), self._batches_before(epoch + 1)
        in_turn = np.repeat(np.arange(len(first)), np.subtract(end, first))
        buckets = counter_based(self.seed, BUCKETS, epoch).permutation(in_turn)
        batches = np.empty_like(buckets)
        for bucket, batches_of_it in enumerate(map(np.arange, first, end)):
            batches[buckets == bucket] = batches_of_it
        return _Epoch(range(sum(first), sum(end)), buckets, batches)


@dataclass(frozen=True)
class _Epoch:
    """The steps of an epoch: for each, which bucket, and which of that bucket's batches."""

    steps: range
    buckets: np.ndarray
    batches: np.ndarray


class _Stream:
    """Samples again and again, each time shuffled anew."""

    def __init__(self, samples: np.ndarray, seed: int, bucket: int) -> None:
        self.samples, self.seed, self.bucket = samples, seed, bucket
        self._round, self._shuffled = -1, samples

    def sample(self, place: int) -> int:
        number, at = divmod(place, len(self.samples))
        if number != self._round:
            rng = counter_based(self.seed, ORDER, number, self.bucket)
            self._round, self._shuffled = number, self.samples[rng.permutation(len(self.samples))]
        return int(self._shuffled[at])
