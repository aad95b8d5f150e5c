"""Mirror images: encoded beside the pictures, and shown instead of them by chance."""

from __future__ import annotations

import re
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.artifacts import digest_tree, manifest_of, opening
from ldm.cache import LatentCache
from ldm.checkpoint import folders
from ldm.images import decode_image, encode_png
from ldm.latents import MIRRORED, MOMENTS, SampleReader
from ldm.train.data import TrainingBatches, validation_batches
from tests.encoding import Project, encoded_in, in_shards, picture, write_images
from tests.test_train import run_here

SIZES = [(64, 64), (64, 32), (32, 64)]
ROWS, BATCH = 24, 4
PARTS = ("latents", "noise", "texts", "timesteps")


def mirror(content: bytes) -> bytes:
    """A picture of its own."""
    return encode_png(np.ascontiguousarray(decode_image(content)[:, ::-1]))


@dataclass
class Three:
    """The same samples: as they are, with flips, and each picture mirrored before it came in."""

    plain: Project
    flipped: Project
    turned: Project


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Three:
    made = []
    # The second scene, cut so, is an empty ground.
    pictures = [picture(row, SIZES[row % 3]) for row in range(3, ROWS + 3)]
    for name in ("plain", "flipped", "turned"):
        project = Project(tmp_path_factory.mktemp(name), pipeline)
        own = [mirror(one) for one in pictures] if name == "turned" else pictures
        rows = {f"{row:08d}": (one, f"caption {row // 2}") for row, one in enumerate(own)}
        write_images(project.images, in_shards(rows, 10))
        project.settings["flip"] = name == "flipped"
        project.encode()
        made.append(project)
    return Three(*made)


@pytest.fixture
def flipped(three: Three, tmp_path: Path) -> Project:
    """After a run with flips, in folders of its own."""
    project = Project(tmp_path, three.flipped.pipeline)
    shutil.copytree(three.flipped.images, project.images)
    shutil.copytree(three.flipped.runs, project.runs)
    project.settings = {**three.flipped.settings}
    return project


def samples(project: Project, split: str = "train") -> SampleReader:
    return SampleReader(opening(project.out, "latents", "encode"), split)


# --- encode


def test_what_is_mirrored_is_what_a_mirrored_picture_is_encoded_to(three: Three) -> None:
    plain, flipped, turned = map(samples, (three.plain, three.flipped, three.turned))
    assert len(flipped) == ROWS
    for key in flipped:
        assert flipped.read(key, MOMENTS) == plain.read(key, MOMENTS)
        assert flipped.read(key, MIRRORED) == turned.read(key, MOMENTS)
        assert flipped.read(key, MIRRORED) != flipped.read(key, MOMENTS)


def test_only_training_samples_have_them_and_only_with_flips(three: Three) -> None:
    assert samples(three.plain).arrays == samples(three.flipped, "validation").arrays == (MOMENTS,)
    plain, flipped = (manifest_of(one.out) for one in (three.plain, three.flipped))
    assert plain and flipped
    assert set(plain.config) == {"compute", "storage", "scaling_factor", "shift_factor"}
    assert flipped.config == {**plain.config, "flip": True}
    assert flipped.counts == plain.counts
    changed = {name for name, _ in flipped.files.items() ^ plain.files.items()}
    assert changed == {f"train-0000{number}.tar" for number in range(3)}


def test_turned_off_and_on_again_only_mirror_images_are_encoded(
    flipped: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    for flip, encoded in ((True, 0), (False, 0), (True, ROWS)):
        flipped.settings["flip"] = flip
        flipped.encode()
        said = capsys.readouterr().out
        assert encoded_in(said) == (encoded, 0)
        assert ("24 training, each mirrored too, and 1 validation" in said) is flip
        flipped.assert_as_if_clean()
        capsys.readouterr()


def test_the_bar_counts_what_there_is_to_encode(
    images: Path, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 48 training and 16 validation pictures."""
    project = Project(tmp_path, pipeline)
    project.images, project.settings["flip"] = images, True
    project.encode()
    assert re.search(r"encode pictures: 100%.* 112/112 ", capsys.readouterr().err)


@pytest.mark.parametrize(("shown", "other"), [(MOMENTS, MIRRORED), (MIRRORED, MOMENTS)])
def test_only_the_array_that_is_shown_is_read(
    three: Three, tmp_path: Path, shown: str, other: str
) -> None:
    """The other ones are damaged after they were verified."""
    shutil.copytree(three.flipped.out, tmp_path / "latents")
    cache = LatentCache(tmp_path / "latents", "train")
    same_shape = [sample for sample in range(ROWS) if cache.latent_shape(sample) == (4, 8, 8)]
    mirrored = [shown == MIRRORED] * len(same_shape)
    before = cache.moments(same_shape, mirrored)
    for path in cache.manifest.path.glob("train-*.tar"):
        with tarfile.open(path) as tar, path.open("r+b") as file:
            for member in (one for one in tar if one.name.endswith(other)):
                file.seek(member.offset_data)
                file.write(bytes(16))
    assert np.array_equal(cache.moments(same_shape, mirrored), before)
    with pytest.raises(ValueError, match="magic string"):
        cache.moments(same_shape, [not one for one in mirrored])


# --- train


def batches(project: Project, batch_size: int = BATCH, **changes: int) -> TrainingBatches:
    cache = LatentCache(project.out, "train")
    settings = {"seed": 3, "timesteps": 1000, "caption_dropout": 0.3}
    return TrainingBatches(cache, batch_size=batch_size, **settings, **changes)  # type: ignore[arg-type]


def test_every_sample_is_shown_either_way_and_half_of_them_mirrored(three: Three) -> None:
    """Nothing else of a batch is changed by it."""
    plain, flipped, turned = map(batches, (three.plain, three.flipped, three.turned))
    ways = []
    for number in range(150):
        as_it_is, shown, mirrored = plain[number], flipped[number], turned[number]
        for part in PARTS[1:]:
            assert torch.equal(getattr(shown, part), getattr(as_it_is, part))
        for place, latents in enumerate(shown.latents):
            way = torch.equal(latents, mirrored.latents[place])
            assert way is not torch.equal(latents, as_it_is.latents[place])
            ways.append((flipped.order.sample(number * BATCH + place), way))
    assert 0.45 < sum(way for _, way in ways) / len(ways) < 0.55
    assert set(ways) == {(sample, way) for sample in range(ROWS) for way in (False, True)}
    epochs = [[way for _, way in sorted(ways[start : start + ROWS])] for start in (0, ROWS)]
    assert epochs[0] != epochs[1]


def test_a_step_is_mirrored_alike_however_it_is_shared(three: Three) -> None:
    """Over processes and micro-batches, whatever was read before."""
    whole = batches(three.flipped, 8)
    for step in range(11, -1, -1):
        parts = [
            batches(three.flipped, 4, accumulation=2, rank=rank, processes=2)[2 * step + half]
            for half in (0, 1)
            for rank in (0, 1)
        ]
        assert torch.equal(whole[step].latents, torch.cat([part.latents for part in parts]))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_validation_shows_pictures_as_they_are(three: Three, split: str) -> None:
    plain, flipped = (
        validation_batches(LatentCache(one.out, split), seed=0, batch_size=4, timesteps=1000)
        for one in (three.plain, three.flipped)
    )
    for (as_it_is, _), (shown, _) in zip(plain, flipped, strict=True):
        assert all(torch.equal(getattr(shown, part), getattr(as_it_is, part)) for part in PARTS)


def test_a_training_with_flips_goes_on_to_the_same_bytes(three: Three, tmp_path: Path) -> None:
    settings = {"steps": 6, "batch_size": BATCH, "sample_every": None, "checkpoint_every": 2}
    models = []
    for name, project in (("flipped", three.flipped), ("plain", three.plain)):
        model = run_here(project.pipeline, project.out, tmp_path / name, **settings)
        models.append(digest_tree(model))
    assert models[0] != models[1]
    (run,) = tmp_path.glob("flipped/runs/*")
    *_, last = folders(run)
    (last / "state.json").unlink()
    again = run_here(
        three.flipped.pipeline, three.flipped.out, tmp_path / "flipped", **settings, workers=1
    )
    assert digest_tree(again) == models[0]
