"""Training refuses latents that are no longer those of the pictures and settings that there are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldm.artifacts import MANIFEST
from ldm.cli import main
from ldm.config import Encode
from ldm.errors import UserError
from ldm.train.stale import expect_current
from tests.encoding import ROOT, Project, Rows, in_shards, picture, write_images

ROWS: Rows = {f"{row:08d}": (picture(row), f"caption {row}") for row in range(6)}
FIRST = "00000000"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Project:
    project = Project(tmp_path_factory.mktemp("encoded"), pipeline)
    write_images(project.images, in_shards(ROWS, 4))
    project.encode()
    return project


def without(key: str) -> Rows:
    return {name: row for name, row in ROWS.items() if name != key}


CHANGES: dict[str, Rows] = {
    "1 with another caption": {**ROWS, FIRST: (picture(0), "other words")},
    "the same samples with other pixels": {**ROWS, FIRST: (picture(50), "caption 0")},
    "1 samples new, 1 gone": {**without(FIRST), "00000009": (picture(9), "new")},
    "1 gone, 1 with another caption": {**without(FIRST), "00000001": (picture(1), "words")},
}


def test_what_was_just_encoded_is_current(encoded: Project) -> None:
    expect_current(encoded.out, encoded.images, Encode())


@pytest.mark.parametrize("said", CHANGES)
def test_what_changed_since_is_said(encoded: Project, tmp_path: Path, said: str) -> None:
    images = write_images(tmp_path / "images", in_shards(CHANGES[said], 4))
    message = rf"latents: is stale, {images} has changed since \({said}.*\); run `ldm encode` again"
    with pytest.raises(UserError, match=message):
        expect_current(encoded.out, images, Encode())


def test_a_manifest_alone_is_enough_to_see_it(encoded: Project, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", in_shards(without(FIRST), 4))
    for path in images.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"changed since \(its shards are others\)"):
        expect_current(encoded.out, images, Encode())


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        ("compute", "float32", "bfloat16"),
        ("storage", "float32", "float16"),
        ("flip", False, True),
    ],
)
def test_other_settings_are_said(encoded: Project, name: str, was: object, now: object) -> None:
    message = rf"encode\.{name} {was}, which is {now} now; .* or set encode\.{name} to {was}"
    with pytest.raises(UserError, match=message):
        expect_current(encoded.out, None, Encode.model_validate({name: now}))


def test_pictures_that_changed_are_told_of_latents_with_flips(
    encoded: Project, tmp_path: Path
) -> None:
    project = Project(tmp_path, encoded.pipeline)
    project.images, project.settings["flip"] = encoded.images, True
    project.encode()
    expect_current(project.out, project.images, Encode(flip=True))
    with pytest.raises(UserError, match=r"encode\.flip True, which is False now"):
        expect_current(project.out, project.images, Encode())
    images = write_images(tmp_path / "images", in_shards(without(FIRST), 4))
    with pytest.raises(UserError, match=r"is stale, .* \(1 gone\)"):
        expect_current(project.out, images, Encode(flip=True))


def test_without_pictures_there_is_nothing_to_compare(encoded: Project, tmp_path: Path) -> None:
    expect_current(encoded.out, tmp_path, Encode())
    expect_current(tmp_path, encoded.images, Encode())
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        expect_current(encoded.out, tmp_path, Encode())


def test_ldm_train_compares_with_the_pictures_beside_the_latents(
    encoded: Project, tmp_path: Path
) -> None:
    shutil.copytree(encoded.out, tmp_path / "latents")
    write_images(tmp_path / "images", in_shards(without(FIRST), 4))
    others = write_images(tmp_path / "others", in_shards(CHANGES["1 with another caption"], 4))
    train = ["train", "--params", str(ROOT / "params.yaml"), "--latents", str(tmp_path / "latents")]
    train += [f"--{name}={tmp_path / name}" for name in ("out", "runs")]
    for extra, said in (([], "1 gone"), (["--images", str(others)], "1 with another caption")):
        with pytest.raises(SystemExit, match=said):
            main([*train, *extra])
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock")
    assert left == ["images", "latents", "others"]
