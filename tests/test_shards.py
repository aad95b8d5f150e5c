from __future__ import annotations

import io
import os
import pickle
import tarfile
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm import shards
from ldm.artifacts import opening, writing
from ldm.errors import UserError
from ldm.shards import ShardReader
from tests.shards import write_shards

MEMBERS = frozenset({"png", "json"})
SAMPLES = {f"{row:08d}": {"png": b"p" * row, "json": b'{"row": %d}' % row} for row in range(5)}


def write(folder: Path, samples: dict[str, dict[str, bytes]], a_shard: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, "train", samples.items(), a_shard)
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def read_all(folder: Path, extensions: frozenset[str] = MEMBERS) -> dict[str, dict[str, bytes]]:
    reader = ShardReader(folder, "train", extensions)
    return {key: {name: reader.read(key, name) for name in extensions} for key in reader}


def test_shards_are_numbered_and_filled_in_order(tmp_path: Path) -> None:
    write(tmp_path, SAMPLES)
    names = [f"train-{number:05d}.tar" for number in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with tarfile.open(tmp_path / names[1]) as tar:
        expected = ["00000002.json", "00000002.png", "00000003.json", "00000003.png"]
        assert tar.getnames() == expected


def test_reading_in_any_order_and_in_another_process(tmp_path: Path) -> None:
    reader = ShardReader(write(tmp_path, SAMPLES), "train", MEMBERS)
    assert (len(reader), reader.keys) == (5, list(SAMPLES))
    assert [reader.key(number) for number in range(5)] == list(SAMPLES)
    assert reader.numbers(reversed(SAMPLES)).tolist() == [4, 3, 2, 1, 0]
    with pytest.raises(KeyError, match="strange"):
        reader.numbers(["strange"])
    reader.expect(range(5), "png")
    pickled = pickle.dumps(reader)
    assert reader.read("00000004", "png") == b"pppp"
    assert reader.read("00000000", "png") == b""
    assert pickle.dumps(reader) == pickled, "no open file goes along"
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read("00000003", "json") == b'{"row": 3}'


def test_no_more_than_so_many_files_are_open(tmp_path: Path) -> None:
    names = [f"{number:08d}" for number in range(3 * shards.MOST_OPEN)]
    folder = write(tmp_path, {name: {"png": name.encode()} for name in names}, a_shard=1)
    reader = ShardReader(folder, "train", frozenset({"png"}))
    before = open_files()
    for order in (names, names[::-1], names):
        assert [reader.read(name, "png") for name in order] == [name.encode() for name in order]
    assert open_files() - before == shards.MOST_OPEN
    reader.close()
    assert open_files() == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=120),
    st.integers(0, 2**33 - 1),
)
def test_a_header_is_tarfiles(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    try:
        expected = info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:
        with pytest.raises(ValueError, match="name is too long"):
            shards._header(name, size)
    else:
        assert shards._header(name, size) == expected


def test_a_shard_is_byte_for_byte_tarfiles(tmp_path: Path) -> None:
    members = [(f"{row}.bin", bytes([row]) * 700 * row) for row in range(40)]
    with shards.writing_shard(tmp_path / "ours.tar") as write:
        for name, content in members:
            key, _, extension = name.partition(".")
            write(key, {extension: content})
    with tarfile.TarFile(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_many_are_read_at_once(tmp_path: Path) -> None:
    samples = {f"{n}": {"bin": b"head" + bytes([n] * 6), "txt": b"x" * n} for n in (2, 0, 1)}
    reader = ShardReader(write(tmp_path, samples), "train", frozenset({"bin", "txt"}))
    rows = np.empty((4, 3), np.int16)
    reader.read_each([0, 2, 1, 0], "bin", b"head", rows)
    assert (rows == np.array([2, 1, 0, 2])[:, None] * 0x0101).all()
    with pytest.raises(UserError, match=r"train-00000\.tar: 2\.bin is not of the shape .*; make"):
        reader.read_each([0, 1], "bin", b"tail", rows[:2])
    with pytest.raises(UserError, match=r"train-00001\.tar: 1\.txt is not of the shape"):
        reader.read_each([0, 2], "txt", b"", np.empty((2, 2), np.uint8))
    os.truncate(reader.paths[-1], 520)
    with pytest.raises(UserError, match=f"{reader.paths[-1].name}: was cut short"):
        reader.read_each([2], "bin", b"head", rows[:1])


def test_other_prefixes_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, SAMPLES)
    write_tar(tmp_path / "validation-00000.tar", [("x.exe", b"")])
    assert read_all(tmp_path) == SAMPLES


KEYS = st.text("0123456789abcdef_-", min_size=1, max_size=12)
SETS = st.dictionaries(KEYS, st.fixed_dictionaries({"a": st.binary(), "b.c": st.binary()}))


@given(SETS, st.integers(1, 4))
@settings(max_examples=50)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, dict[str, bytes]], a_shard: int
) -> None:
    folder = write(tmp_path_factory.mktemp("round"), samples, a_shard)
    assert read_all(folder, frozenset({"a", "b.c"})) == samples
    assert len(list(folder.iterdir())) == -(-len(samples) // a_shard)


@given(st.lists(st.text("ab大é", max_size=3), unique=True, max_size=12), st.data())
@settings(max_examples=100)
def test_the_index_is_that_of_tarfile(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], data: st.DataObject
) -> None:
    """Members in any order, a sample's apart from each other, over some shards."""
    folder = tmp_path_factory.mktemp("index")
    members = data.draw(st.permutations([(key, name) for key in keys for name in sorted(MEMBERS)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(members)), max_size=2)))
    for shard, (start, end) in enumerate(pairwise([0, *cuts, len(members)])):
        contents = [(".".join(name), repr(name).encode()) for name in members[start:end]]
        write_tar(folder / f"train-{shard:05d}.tar", contents)
    reader = ShardReader(folder, "train", MEMBERS)
    assert list(reader) == reader.keys == list(dict.fromkeys(key for key, _ in members))
    for key, name in members:
        assert reader.read(key, name) == repr((key, name)).encode()
    for unknown in {"", "a", "b", "c", "大", "aaaa"} - set(keys):
        with pytest.raises(KeyError):
            reader.read(unknown, "png")


def test_the_index_is_small(tmp_path: Path) -> None:
    """8 bytes of key, 8 of place, 20 a member: 100,000 samples must not weigh on a loader."""
    count = 4000
    samples = {f"{row:08d}": {"png": b"", "json": b""} for row in range(count)}
    write(tmp_path, samples, a_shard=count)
    tracemalloc.start()
    reader = ShardReader(tmp_path, "train", MEMBERS)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(reader) == count
    assert size < 60 * count + 2**17
    assert peak < 1000 * count


def test_equal_samples_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "first", SAMPLES)
    monkeypatch.setattr("time.time", lambda: 2e9)
    turned = {key: dict(reversed(members.items())) for key, members in SAMPLES.items()}
    second = write(tmp_path / "second", turned)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    with tarfile.open(first / "train-00000.tar") as tar:
        about = {(info.mtime, info.mode, info.uid, info.gid, info.uname) for info in tar}
    assert about == {(0, 0o644, 0, 0, "")}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b""), ("a.json", b""), ("a.png", b"x")], "'a.png' occurs twice"),
        ([("../a.png", b""), ("../a.json", b"")], r"unexpected member '../a.png'"),
        ([("/a.png", b""), ("/a.json", b"")], "unexpected member"),
        ([("folder/a.png", b"")], "unexpected member"),
        ([("a.png", b""), ("a.json", b""), ("a.pickle", b"")], "unexpected member 'a.pickle'"),
        ([("png", b"")], "unexpected member"),
        ([("a.png", b"")], "sample 'a' lacks json"),
    ],
)
def test_unexpected_members_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(tmp_path / "train-00000.tar", members)
    with pytest.raises(UserError, match=rf"{message}.*; make the shards again"):
        ShardReader(tmp_path, "train", MEMBERS)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_the_like_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "train-00000.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(UserError, match=r"unexpected member 'a\.png'"):
        ShardReader(tmp_path, "train", MEMBERS)


def test_the_first_fault_is_named(tmp_path: Path) -> None:
    shards = [["b.json", "b.png"], ["d.json", "d.png", "a.json"], ["c.json", "c.png"]]
    for number, members in enumerate(shards):
        write_tar(tmp_path / f"train-{number:05d}.tar", [(name, b"") for name in members])
    with pytest.raises(UserError, match=r"train-00001\.tar: sample 'a' lacks png"):
        ShardReader(tmp_path, "train", MEMBERS)
    write_tar(tmp_path / "train-00003.tar", [("a.png", b""), ("d.png", b""), ("b.png", b"")])
    with pytest.raises(UserError, match=r"train-00003\.tar: member 'd\.png' occurs twice"):
        ShardReader(tmp_path, "train", MEMBERS)


def test_sample_in_two_shards_is_refused(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"train-{shard:05d}.tar", [("a.png", b""), ("a.json", b"")])
    with pytest.raises(UserError, match="occurs twice"):
        ShardReader(tmp_path, "train", MEMBERS)


def member_ends(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [info.offset_data + -(-info.size // 512) * 512 for info in tar]


@pytest.mark.parametrize("member", range(8))
def test_tar_cut_at_a_member_is_refused(tmp_path: Path, member: int) -> None:
    """Cut there, tarfile itself sees nothing wrong."""
    folder = tmp_path / "images"
    with writing(folder, "images", config={}, inputs={}) as fresh:
        write(fresh, SAMPLES, a_shard=10)
    path = folder / "train-00000.tar"
    path.write_bytes(path.read_bytes()[: member_ends(path)[member]])
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == member + 1
    with pytest.raises(UserError, match=r"train-00000\.tar: damaged tar"):
        ShardReader(folder, "train", MEMBERS)
    with pytest.raises(UserError, match=r"train-00000\.tar: is not what was written"):
        opening(folder, "images", "ingest")


def test_whole_shard_less_is_refused_through_the_manifest(tmp_path: Path) -> None:
    with writing(tmp_path / "images", "images", config={}, inputs={}) as fresh:
        write(fresh, SAMPLES)
    (tmp_path / "images" / "train-00002.tar").unlink()
    assert len(ShardReader(tmp_path / "images", "train", MEMBERS)) == 4
    with pytest.raises(UserError, match=r"train-00002\.tar: is missing"):
        opening(tmp_path / "images", "images", "ingest")


@given(cut=st.integers(0, 5119))
@settings(max_examples=60)
def test_tar_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = write(tmp_path_factory.mktemp("cut"), {"a": {"png": b"p" * 1500, "json": b"{}"}})
    path = folder / "train-00000.tar"
    ends = member_ends(path)[-1] + 1024
    path.write_bytes(path.read_bytes()[: min(cut, ends - 1)])
    with pytest.raises(UserError, match=r"damaged tar|lacks"):
        ShardReader(folder, "train", MEMBERS)


@given(st.data())
@settings(max_examples=100)
def test_flipped_bit_never_hides_a_sample(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write(tmp_path_factory.mktemp("bit"), SAMPLES, a_shard=10)
    path = folder / "train-00000.tar"
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, member_ends(path)[-1] + 1023))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        reader = ShardReader(folder, "train", MEMBERS)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert reader.keys == list(SAMPLES)


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\x1f\x8b" + bytes(1024), b"x" * 10240])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train-00000.tar").write_bytes(content)
    with pytest.raises(UserError, match="damaged tar"):
        ShardReader(tmp_path, "train", MEMBERS)


def test_shard_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLES, a_shard=10) / "train-00000.tar"
    reader = ShardReader(tmp_path, "train", MEMBERS)
    with path.open("r+b") as file:
        file.truncate(1024)
    with pytest.raises(UserError, match="was cut short"):
        reader.read("00000004", "png")
