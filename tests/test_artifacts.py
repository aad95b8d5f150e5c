from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.artifacts import MANIFEST, digest_tree, making, opening, write_json, write_whole, writing
from ldm.cli import main
from ldm.errors import UserError, full_disk_told
from tests.disk import room_for
from tests.encoding import ROOT


def write(target: Path, files: dict[str, bytes], **changes: object) -> None:
    made: dict = {"config": {"size": 64}, "inputs": {"list": "abc"}, "counts": {"train": 2}}
    with writing(target, "images", **(made | changes)) as fresh:
        for name, content in files.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            (fresh / name).write_bytes(content)


def write_and_fail(target: Path, error: type[BaseException]) -> None:
    with writing(target, "images", config={}, inputs={}) as fresh:
        (fresh / "a.tar").write_bytes(b"half")
        raise error


FILES = {"a.tar": b"first", "folder/b.json": b"{}"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write(tmp_path / "images", FILES)
    return tmp_path / "images"


def only(folder: Path) -> list[str]:
    """What is there, but for locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_round_trip_says_what_made_it(target: Path) -> None:
    manifest = opening(target, "images", "ingest")
    assert manifest.config == {"size": 64}
    assert manifest.inputs == {"list": "abc"}
    assert manifest.counts == {"train": 2}
    assert sorted(manifest.files) == ["a.tar", "folder/b.json"]
    assert manifest.path == target
    assert only(target.parent) == ["images"]


def test_equal_content_gives_equal_bytes_and_digest(target: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", dict(reversed(FILES.items())))
    assert (target / MANIFEST).read_bytes() == (tmp_path / "elsewhere" / MANIFEST).read_bytes()
    first = opening(target, "images", "ingest")
    write(tmp_path / "elsewhere", FILES | {"a.tar": b"other"})
    assert opening(tmp_path / "elsewhere", "images", "ingest").digest != first.digest


def test_counts_filled_inside_the_block_are_written(tmp_path: Path) -> None:
    counts: dict[str, int] = {}
    with writing(tmp_path / "out", "images", config={}, inputs={}, counts=counts):
        counts["train"] = 7
    assert opening(tmp_path / "out", "images", "ingest").counts == {"train": 7}


def test_rewriting_replaces_all_of_the_earlier_directory(target: Path) -> None:
    write(target, {"c.tar": b"second"})
    assert only(target) == ["c.tar", MANIFEST]
    assert only(target.parent) == ["images"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a file", "out: is a file; give another --out"),
        ("files", "out: has files, and no manifest.json"),
        ("another kind", "out: holds 'latents', not 'images'"),
        ("a file above", r"out: cannot be made in .*above; give another --out"),
        ("the working directory", "cannot be replaced by a folder; give another --out"),
    ],
)
def test_what_is_no_earlier_output_of_its_kind_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("mine")
    elif what == "files":
        (out / "folder").mkdir(parents=True)
        (out / "folder" / "mine.txt").write_text("mine")
    elif what == "another kind":
        with writing(out, "latents", config={}, inputs={}) as fresh:
            (fresh / "mine.txt").write_text("mine")
    elif what == "a file above":
        (tmp_path / "above").write_text("mine")
        out = tmp_path / "above" / "folder" / "out"
    else:
        out.mkdir()
        monkeypatch.chdir(out)
        out = Path()
    before = digest_tree(tmp_path)
    with pytest.raises(UserError, match=message):
        write(out, FILES)
    assert digest_tree(tmp_path) == before


def test_ldm_train_looks_before_it_works(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="has files, and no manifest"):
        main(["train", "--params", str(ROOT / "params.yaml"), "--out", str(tmp_path)])


def test_an_empty_folder_and_a_damaged_output_are_replaced(target: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (target / MANIFEST).write_text("{")
    for out in (tmp_path / "empty", target):
        write(out, FILES)
        assert opening(out, "images", "ingest").counts == {"train": 2}


def test_behind_a_link_what_it_leads_to_is_replaced(target: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    for content in (b"second", b"third"):
        write(link, {"c.tar": content})
        assert link.is_symlink() and (target / "c.tar").read_bytes() == content
    assert only(tmp_path) == ["images", "link"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_and_fail(tmp_path / "out", error)
    assert only(tmp_path) == []


def test_error_keeps_the_earlier_directory(target: Path) -> None:
    before = digest_tree(target), (target / MANIFEST).read_bytes()
    with pytest.raises(RuntimeError):
        write_and_fail(target, RuntimeError)
    assert (digest_tree(target), (target / MANIFEST).read_bytes()) == before
    assert only(target.parent) == ["images"]


def test_manifest_that_cannot_be_written_keeps_the_earlier_directory(target: Path) -> None:
    with pytest.raises(TypeError):
        write(target, FILES, config={"not json": object()})
    assert opening(target, "images", "ingest").config == {"size": 64}
    assert only(target.parent) == ["images"]


def test_leavings_of_a_killed_run_do_not_get_in(target: Path) -> None:
    killed = target.parent / ".images.writing"
    killed.mkdir()
    (killed / "stale.tar").write_bytes(b"stale")
    write(target, FILES)
    assert only(target) == ["a.tar", "folder", MANIFEST]
    assert only(target.parent) == ["images"]


WRITERS = {
    "writing": """
with writing(target, "images", config={}, inputs={}) as fresh:
    (fresh / "a.tar").write_bytes(b"first")
    at_work()
    (fresh / "b.tar").write_bytes(b"first")
""",
    "making": """
with making(target, "images") as write:
    at_work()
    with write(config={}, inputs={}) as fresh:
        (fresh / "a.tar").write_bytes(b"first")
        (fresh / "b.tar").write_bytes(b"first")
""",
}
BEFORE = """
import sys
from pathlib import Path
from ldm.artifacts import making, writing
target = Path(sys.argv[1])
def at_work():
    print(flush=True)
    input()
"""


@contextmanager
def at_work(way: str, target: Path) -> Iterator[Popen[bytes]]:
    """Another process that makes the target; it goes on with the next line it reads."""
    command = [sys.executable, "-c", BEFORE + WRITERS[way], str(target)]
    with Popen(command, stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        yield process


@pytest.mark.parametrize("way", WRITERS)
def test_a_second_writer_is_refused_and_costs_the_first_nothing(tmp_path: Path, way: str) -> None:
    target = tmp_path / "images"
    refused = f"^{target}: another process makes it; wait for it, or stop it$"
    with at_work(way, target) as first:
        with pytest.raises(UserError, match=refused):
            write(target, FILES)
        with pytest.raises(UserError, match=refused), making(target, "images"):
            pass
        write(tmp_path / "other", FILES)
        first.communicate(b"\n")
    assert sorted(opening(target, "images", "ingest").files) == ["a.tar", "b.tar"]
    assert only(tmp_path) == ["images", "other"]


@pytest.mark.parametrize("way", WRITERS)
def test_a_writer_that_was_killed_is_in_nobodys_way(tmp_path: Path, way: str) -> None:
    target = tmp_path / "images"
    with at_work(way, target) as killed:
        killed.kill()
    write(target, FILES)
    assert only(target) == ["a.tar", "folder", MANIFEST]
    assert only(tmp_path) == ["images"]


def test_altered_file_is_refused(target: Path) -> None:
    (target / "a.tar").write_bytes(b"fIrst")
    with pytest.raises(UserError, match=r"a\.tar: is not what was written; run `ldm ingest`"):
        opening(target, "images", "ingest")


def test_missing_file_is_refused(target: Path) -> None:
    (target / "folder" / "b.json").unlink()
    with pytest.raises(UserError, match=r"b\.json: is missing; run `ldm ingest`"):
        opening(target, "images", "ingest")


@pytest.mark.parametrize("name", ["c.tar", ".hidden", "folder/c"])
def test_added_file_is_refused(target: Path, name: str) -> None:
    (target / name).write_bytes(b"")
    with pytest.raises(UserError, match="is not in the manifest"):
        opening(target, "images", "ingest")


@given(st.data())
@settings(max_examples=50)
def test_any_flipped_bit_of_a_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = data.draw(st.binary(min_size=1, max_size=64))
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    target = tmp_path_factory.mktemp("flipped") / "images"
    write(target, {"a": content})
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    (target / "a").write_bytes(flipped)
    with pytest.raises(UserError, match="is not what was written"):
        opening(target, "images", "ingest")


@pytest.mark.parametrize(
    ("kind", "message"), [("latents", "holds 'images' of schema 1, not 'latents'")]
)
def test_other_kind_is_refused(target: Path, kind: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opening(target, kind, "encode")


def test_other_schema_is_refused(target: Path) -> None:
    content = json.loads((target / MANIFEST).read_text()) | {"schema_version": 99}
    write_json(target / MANIFEST, content)
    with pytest.raises(UserError, match="of schema 99, not 'images' of schema 1"):
        opening(target, "images", "ingest")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"kind": "images"}', b"\xff\xfe", b"null"]
)
def test_unreadable_manifest_is_refused_in_one_line(target: Path, content: bytes) -> None:
    (target / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read") as caught:
        opening(target, "images", "ingest")
    assert "\n" not in str(caught.value)


def test_missing_or_unfinished_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory; run `ldm ingest`"):
        opening(tmp_path / "none", "images", "ingest")
    with pytest.raises(UserError, match="unfinished or not ours; run `ldm ingest`"):
        opening(tmp_path, "images", "ingest")


def test_write_whole_replaces_and_leaves_nothing_aside(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        write_whole(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert only(tmp_path) == ["file"]


def test_a_full_disk_is_told_and_leaves_the_earlier_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"first")
    with room_for(1000), pytest.raises(UserError, match=r"/file: cannot be written \(File too"):
        write_whole(tmp_path / "file", bytes(2000))
    assert (tmp_path / "file").read_bytes() == b"first"
    assert only(tmp_path) == ["file"]


def test_a_path_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "folder", tmp_path / "file"):
        with pytest.raises(UserError, match=f"^{folder}: cannot be used"), full_disk_told(tmp_path):
            folder.mkdir(parents=True)


def test_a_full_disk_in_the_block_is_told_of_the_directory(target: Path) -> None:
    before = digest_tree(target)
    full = pytest.raises(UserError, match=rf"^{target}: cannot be written \(File too large\); make")
    with full, room_for(1000), writing(target, "images", config={}, inputs={}) as fresh:
        (fresh / "large").write_bytes(bytes(2000))
    assert digest_tree(target) == before
    assert only(target.parent) == [target.name]
