"""Damaged latents: an error that names the shard, never a silently shorter epoch.

Each damage is found twice: by the manifest's hashes, and, where someone made the manifest anew,
by the reader, as far as a tar can tell.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.artifacts import MANIFEST, digest_tree, write_json
from ldm.cache import LatentCache
from ldm.errors import UserError

SHARD = "train-00000.tar"


@pytest.fixture
def cache(latents: Path, tmp_path: Path) -> Path:
    shutil.copytree(latents, tmp_path / "latents")
    return tmp_path / "latents"


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def append(path: Path, name: str, content: bytes = b"") -> None:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def cut_at_member(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: members(path)[10].offset])


def flip_header(path: Path) -> None:
    flip(path, members(path)[10].offset)


def flip_payload(path: Path) -> None:
    flip(path, members(path)[10].offset_data)


def repeat_key(path: Path) -> None:
    append(path, members(path)[0].name)


def climb_out(path: Path) -> None:
    append(path, "../outside.json", b"{}")


def add_pickle(path: Path) -> None:
    append(path, "00000000.pkl", pickle.dumps(print))


def add_webdataset_pickle(path: Path) -> None:
    append(path, "00000000.pyd", pickle.dumps(print))


def add_pipe(path: Path) -> None:
    append(path, "pipe:touch outside.json")


def lose(path: Path) -> None:
    path.unlink()


def repeat_shard(path: Path) -> None:
    shutil.copyfile(path, path.with_name("train-00007.tar"))


DAMAGES: list[tuple[Callable[[Path], None], str | None]] = [
    (cut_at_member, rf"{SHARD}: damaged tar"),
    (flip_header, rf"{SHARD}: damaged tar"),
    (flip_payload, None),
    (repeat_key, rf"{SHARD}: member '.*' occurs twice"),
    (climb_out, rf"{SHARD}: unexpected member '\.\./outside\.json'"),
    (add_pickle, rf"{SHARD}: unexpected member '00000000\.pkl'"),
    (add_webdataset_pickle, rf"{SHARD}: unexpected member '00000000\.pyd'"),
    (add_pipe, rf"{SHARD}: sample 'pipe:touch outside' lacks moments"),
    (lose, None),
    (repeat_shard, r"train-00007\.tar: member '.*' occurs twice"),
]


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES])
def test_the_manifest_knows_every_byte(cache: Path, damage: Callable[[Path], None]) -> None:
    damage(cache / SHARD)
    with pytest.raises(UserError, match=r"latents/train-0000\d\.tar: .*run `ldm encode`"):
        LatentCache(cache, "train")


@pytest.mark.parametrize(("damage", "message"), [one for one in DAMAGES if one[1]])
def test_the_reader_knows_what_a_tar_can_tell(
    cache: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(cache / SHARD)
    manifest = json.loads((cache / MANIFEST).read_text())
    write_json(cache / MANIFEST, manifest | {"files": digest_tree(cache)})
    with pytest.raises(UserError, match=message):
        LatentCache(cache, "train")


def test_a_pipe_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Webdataset would run it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="pipe:touch outside: no such directory"):
        LatentCache(Path("pipe:touch outside"), "train")
    (tmp_path / "pipe:touch outside").mkdir()
    with pytest.raises(UserError, match="pipe:touch outside: has no manifest"):
        LatentCache(Path("pipe:touch outside"), "train")
    assert not (tmp_path / "outside").exists()
