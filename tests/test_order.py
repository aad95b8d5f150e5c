"""Which sample a position shows: steps of one shape, everything as often, by arithmetic alone."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.train.draws import ORDER, counter_based
from ldm.train.order import Order

EPOCHS = 12
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)
"""Of buckets."""
quick = settings(max_examples=60)


def mixed(sizes: Sequence[int]) -> np.ndarray:
    """So many samples of each shape, in no order."""
    shapes = [(8, 4 + bucket, 9 - bucket) for bucket, size in enumerate(sizes) for _ in range(size)]
    return np.random.default_rng(0).permutation(shapes)


def of_one_shape(samples: int) -> np.ndarray:
    return np.array([(8, 4, 4)] * samples)


def shown(order: Order, steps: range) -> np.ndarray:
    """Samples: (steps, batch size)."""
    size = order.batch_size
    return np.array([[order.sample(size * at + place) for place in range(size)] for at in steps])


def batches_after(epochs: int, size: int, batch_size: int) -> int:
    return floor(Fraction(epochs * size, batch_size) + Fraction(1, 2))


@quick
@given(SIZES, st.integers(1, 12), st.integers(0, 9))
def test_steps_are_of_one_shape_and_samples_are_shown_alike(
    sizes: list[int], batch_size: int, seed: int
) -> None:
    shapes = mixed(sizes)
    bucket_of = shapes[:, 1] - 4
    ends = [[batches_after(e, size, batch_size) for size in sizes] for e in range(EPOCHS + 1)]
    steps = shown(Order(shapes, seed, batch_size), range(sum(ends[-1])))
    buckets = bucket_of[steps]
    assert (buckets == buckets[:, :1]).all()
    for epoch, (before, after) in enumerate(pairwise(ends)):
        own = buckets[sum(before) : sum(after), 0]
        expected = np.subtract(after, before)
        assert np.bincount(own, minlength=len(sizes)).tolist() == expected.tolist(), epoch
    times = np.zeros(len(shapes), int)
    for step, bucket in zip(steps, buckets[:, 0], strict=True):
        np.add.at(times, step, 1)
        assert np.ptp(times[bucket_of == bucket]) <= 1
    for sample, bucket in enumerate(bucket_of):
        assert abs(times[sample] - EPOCHS) <= 1 + batch_size / (2 * sizes[bucket])


@quick
@given(SIZES, st.integers(1, 12), st.lists(st.integers(0, 10**7), min_size=1, max_size=20))
def test_any_position_can_be_read_first(
    sizes: list[int], batch_size: int, positions: list[int]
) -> None:
    one = Order(mixed(sizes), 3, batch_size)
    found = [one.sample(position) for position in positions]
    other = pickle.loads(pickle.dumps(one))
    assert [other.sample(position) for position in positions[::-1]] == found[::-1]
    fresh = (Order(mixed(sizes), 3, batch_size) for _ in positions)
    assert [order.sample(at) for order, at in zip(fresh, positions, strict=True)] == found


@quick
@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 9), st.integers(0, 10**6))
def test_samples_of_one_shape_are_shuffled_once_an_epoch(
    samples: int, batch_size: int, seed: int, position: int
) -> None:
    order = Order(of_one_shape(samples), seed, batch_size)
    epoch, place = divmod(position, samples)
    shuffled = counter_based(seed, ORDER, epoch).permutation(samples)
    assert sorted(shuffled) == list(range(samples))
    assert order.sample(position) == shuffled[place]


def test_epochs_seeds_and_buckets_are_shuffled_each_their_own_way() -> None:
    shapes = np.concatenate([of_one_shape(60), of_one_shape(60) * (1, 2, 1)])
    ways = set()
    for seed in (1, 2):
        places = shown(Order(shapes, seed, 4), range(60)).ravel()
        for own in (places[places < 60], places[places >= 60] - 60):
            for epoch in (own[:60], own[60:]):
                assert sorted(epoch) == list(range(60))
                ways.add(tuple(epoch))
    assert len(ways) == 8


def test_an_epochs_batches_are_mixed_and_the_next_ones_otherwise() -> None:
    shapes = np.concatenate([of_one_shape(100), of_one_shape(100) * (1, 2, 1)])
    buckets = shown(Order(shapes, 0, 1), range(400)).ravel() // 100
    first, second = buckets[:200], buckets[200:]
    assert first.sum() == second.sum() == 100
    assert 70 < (first[1:] != first[:-1]).sum() < 130
    assert (first != second).any()
