"""The images artifact as its readers see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.artifacts import opening, writing
from ldm.errors import UserError
from ldm.image_shards import ImageReader, split_of
from ldm.shards import writing_shard

SHARDS = {"train-80x48-00000.tar": "a", "train-64x64-00000.tar": "b", "validation-00000.tar": "c"}


def write(folder: Path, extension: str) -> None:
    with writing(folder, "images", config={"image_format": "jpg"}, inputs={}) as fresh:
        for name, key in SHARDS.items():
            with writing_shard(fresh / name) as append:
                about = json.dumps({"caption": f"words {key}"}).encode()
                append(key, {extension: key.encode(), "json": about})


def test_pictures_and_captions_of_a_split_or_of_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "images", "jpg")
    images = opening(tmp_path / "images", "images", "ingest")
    of_split, of_shard = ImageReader(images, "train"), ImageReader(images, "train-80x48-00000.tar")
    assert (of_split.keys, of_shard.keys) == (["b", "a"], ["a"])
    assert (of_split.picture("b"), of_split.caption("b")) == (b"b", "words b")
    assert {split_of(name) for name in SHARDS} == {"train", "validation"}


def test_pictures_of_another_format_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "images", "png")
    images = opening(tmp_path / "images", "images", "ingest")
    with pytest.raises(UserError, match=r"unexpected member 'b\.png'"):
        ImageReader(images, "train")
