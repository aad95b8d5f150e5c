"""Shards that are cut at keys: what a change of the list changes of them."""

from __future__ import annotations

import hashlib
import random
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.artifacts import digest_file
from ldm.config import Ingest
from ldm.ingest.basis import Basis
from ldm.ingest.blocklist import Blocklist
from ldm.ingest.cuts import CutShards, cut
from ldm.ingest.listed import Listed
from ldm.ingest.repack import repack
from ldm.ingest.results import Fetched
from ldm.ingest.rows import Row, key_of
from ldm.ingest.store import Store
from ldm.shards import ShardReader
from tests.served import photograph, stored

MOST = 4
CONFIG = Ingest(image_size=8, samples_per_shard=MOST)
PICTURES = [stored(photograph(seed, 8)) for seed in range(60)]
NUMBERS = st.lists(st.integers(0, len(PICTURES) - 1), unique=True, max_size=40)


def keys(count: int) -> list[str]:
    return [key_of(f"http://a/{number}") for number in range(count)]


def parts(some: Sequence[str], most: int) -> list[tuple[str, ...]]:
    return [tuple(some[at] for at in part) for part in cut(some, most)]


@given(st.lists(st.integers(), unique=True), st.integers(1, 9))
def test_parts_are_the_whole_in_order_and_none_is_too_long(numbers: list[int], most: int) -> None:
    some = [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers]
    found = parts(some, most)
    assert [key for part in found for key in part] == some
    assert all(1 <= len(part) <= most for part in found)


def test_parts_are_half_as_long_on_average() -> None:
    found = parts(keys(20_000), 100)
    assert 45 < 20_000 / len(found) < 55


@pytest.mark.parametrize("seed", range(200))
def test_a_key_that_goes_or_comes_changes_two_parts_at_most(seed: int) -> None:
    lot = random.Random(seed)
    some = lot.sample(keys(500), lot.randrange(2, 200))
    most = lot.randrange(1, 20)
    gone = lot.randrange(len(some))
    more, fewer = parts(some, most), parts(some[:gone] + some[gone + 1 :], most)
    assert len(set(more) - set(fewer)) <= 2
    # What is cut anew is what was there.
    changed = {key for part in set(more) - set(fewer) for key in part} - {some[gone]}
    assert {key for part in set(fewer) - set(more) for key in part} == changed


# --- the shards


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Knows all pictures."""
    with Store(tmp_path_factory.mktemp("store"), Basis("one", "two")) as store:
        store.take(
            (row_of(0, one), Fetched(str(one), 8, 8, partial(PICTURES.__getitem__, one)))
            for one in range(len(PICTURES))
        )
        yield store


def row_of(number: int, one: int) -> Row:
    return Row("train", number, f"http://a/{one}", f"caption {one}")


def shards_of(store: Store, numbers: Sequence[int], folder: Path) -> Counter[str]:
    """Hashes of the shards of rows with these pictures."""
    rows = [row_of(at, one) for at, one in enumerate(numbers)]
    listed = Listed()
    listed.take(rows, CONFIG)
    repack(listed, store, Blocklist(), folder, CONFIG)
    assert not list(listed.left_out())
    samples = ShardReader(folder, "train", frozenset({"png", "json"}))
    assert {samples.read(row.key, "png") for row in rows} == {PICTURES[one] for one in numbers}
    return Counter(digest_file(path) for path in folder.glob("*.tar"))


@settings(max_examples=30)
@given(NUMBERS, st.data())
def test_a_row_that_goes_leaves_all_shards_but_its_own(
    store: Store, numbers: list[int], data: st.DataObject
) -> None:
    gone = data.draw(st.integers(0, max(len(numbers) - 1, 0)))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        before = shards_of(store, numbers, Path(one))
        after = shards_of(store, numbers[:gone] + numbers[gone + 1 :], Path(other))
    assert (before - after).total() <= 2
    assert (before & after).total() >= before.total() - 2


@settings(max_examples=30)
@given(NUMBERS, st.integers(0, 40))
def test_rows_that_come_leave_all_shards_but_the_last(
    store: Store, numbers: list[int], first: int
) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        before = shards_of(store, numbers[:first], Path(one))
        after = shards_of(store, numbers, Path(other))
    assert (before - after).total() <= 1


def test_shards_are_numbered_and_samples_stand_by_key_in_them(store: Store, tmp_path: Path) -> None:
    shards_of(store, range(40), tmp_path)
    paths = sorted(tmp_path.glob("*.tar"))
    assert [path.name for path in paths] == [f"train-{at:05d}.tar" for at in range(len(paths))]
    held = [list(dict.fromkeys(name.partition(".")[0] for name in names(path))) for path in paths]
    assert [sorted(part) for part in held] == held
    listed = [key_of(f"http://a/{one}") for one in range(40)]
    assert held == [sorted(part) for part in parts(listed, MOST)]


def test_a_shard_of_which_nothing_is_left_is_not_written(tmp_path: Path) -> None:
    candidates = keys(12)
    first, *others = parts(candidates, MOST)
    shards = CutShards(tmp_path, "train", candidates, MOST)
    for key in candidates:
        shards.put(key, None if key in first else lambda: {"json": b"{}"})
    written = sorted(tmp_path.glob("*.tar"))
    assert [path.name for path in written] == [f"train-{at:05d}.tar" for at in range(len(others))]
    assert names(written[0]) == sorted(f"{key}.json" for key in others[0])


def names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()
