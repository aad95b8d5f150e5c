"""Aspect buckets, from a picture's address to trained weights."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from functools import partial, partialmethod
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.artifacts import opening
from ldm.cache import LatentCache
from ldm.config import Encode, FirstStage, Ingest, Pretrained, Registry, Train
from ldm.encode.encoders import posterior_moments
from ldm.encode.stage import encode
from ldm.errors import UserError
from ldm.first_stage.stage import first_stage
from ldm.first_stage.vae import reconstruct
from ldm.images import decode_image, psnr
from ldm.ingest.buckets import Size, buckets, nearest
from ldm.ingest.stage import ingest
from ldm.models import Source, load_vae
from ldm.report.stage import report
from ldm.shards import ShardReader
from ldm.train.data import TrainingBatches
from ldm.train.stage import train
from ldm.train.trainer import Trainer
from tests.launched import SHORT, launch, wait_for
from tests.served import photograph, serving, write_list
from tests.test_evaluate import evaluated

quick = settings(max_examples=100)
STEPS, SIDES = st.sampled_from([8, 16, 24, 64]), st.integers(1, 12)
ASPECTS = st.floats(1, 6)


# --- which there are, and which one is a picture's


def test_the_usual_buckets_of_512_pixels() -> None:
    wide = [(576, 448), (640, 384), (704, 320), (768, 320)]
    wide += [(832, 256), (896, 256), (960, 256), (1024, 256)]
    tall = [(height, width) for width, height in wide]
    assert set(buckets(512, 64, 4)) == {*wide, (512, 512), *tall}


@quick
@given(STEPS, SIDES, ASPECTS)
def test_buckets_are_all_sizes_that_fill_the_area(step: int, sides: int, max_aspect: float) -> None:
    side, found = sides * step, []
    for width in range(step, side * sides + 1, step):
        for height in range(step, side * sides + 1, step):
            short, long = sorted((width, height))
            fits = short * long <= side**2 < (short + step) * long
            if fits and long <= max_aspect * short:
                found.append((width, height))
    assert list(buckets(side, step, max_aspect)) == found
    assert (side, side) in found


@quick
@given(STEPS, SIDES, ASPECTS, st.integers(1, 4000), st.integers(1, 4000))
def test_a_picture_loses_least_in_its_bucket(
    step: int, sides: int, max_aspect: float, width: int, height: int
) -> None:
    sizes = buckets(sides * step, step, max_aspect)

    def left(size: Size) -> float:
        """Share of the picture's area that a crop shows."""
        scale = max(size[0] / width, size[1] / height)
        return size[0] * size[1] / (scale**2 * width * height)

    def apart(size: Size) -> float:
        return abs(log(width / height) - log(size[0] / size[1]))

    found = nearest(width, height, sizes)
    assert left(found) >= max(map(left, sizes)) - 1e-9
    assert apart(found) <= min(map(apart, sizes)) + 1e-9
    assert nearest(width, width, sizes) == (sides * step, sides * step)


@quick
@given(STEPS, SIDES, st.integers(1, 1000), st.integers(1, 1000), ASPECTS)
def test_nothing_is_blown_up_that_a_square_would_not_blow_up(
    step: int, sides: int, short: int, long: int, max_aspect: float
) -> None:
    side = sides * step
    width, height = side + short, side + long
    bucket = nearest(width, height, buckets(side, step, max_aspect))
    assert bucket[0] <= width and bucket[1] <= height


# --- ingest

SIZES: dict[str, Size] = {
    **{f"wide{n}": (300, 190) for n in range(9)},
    **{f"tall{n}": (128, 384) for n in range(7)},
    **{f"square{n}": (201, 190) for n in range(4)},
    "turned": (300, 190),  # Tall when upright.
    "half": (160, 112),
    "cut": (72, 64),  # Not scaled.
    "blown": (70, 46),  # Up to its bucket.
}
BUCKETS = {"wide": (80, 48), "tall": (32, 96), "square": (64, 64), "turned": (48, 80)}
BUCKETS |= {"half": (80, 48), "cut": (64, 64), "blown": (80, 48)}
NAMES = {"train": sorted(SIZES), "validation": ["square0", "square1", "wide0", "wide1", "wide2"]}
CONFIG = Ingest(bucket_step=16, min_side=32, samples_per_shard=4, threads=4, processes=1, retries=0)


def bucket_of(name: str) -> Size:
    return BUCKETS[name.rstrip("0123456789")]


def picture_of(split: str, name: str) -> Image.Image:
    """As it is seen."""
    seed = [*SIZES].index(name) + 1000 * (split == "validation")
    picture = photograph(seed).resize(SIZES[name])
    return picture.transpose(Image.Transpose.ROTATE_270) if name == "turned" else picture


def file_of(split: str, name: str) -> bytes:
    picture, exif, buffer = picture_of(split, name), Image.Exif(), io.BytesIO()
    if name == "turned":
        picture, exif[0x0112] = picture.transpose(Image.Transpose.ROTATE_90), 6
    picture.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def ingested(folder: Path, config: Ingest) -> Path:
    files = {f"{s}-{name}": file_of(s, name) for s, names in NAMES.items() for name in names}
    with serving(files) as server:
        for split, names in NAMES.items():
            rows = [(f"{server}/{split}-{name}", f"a {name} caption") for name in names]
            write_list(folder / "data" / f"{split}.csv", "url,caption", rows)
        ingest(config, folder / "data", folder / "images", folder / "runs")
    return folder / "images"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ingested(tmp_path_factory.mktemp("buckets"), CONFIG)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same pictures."""
    config = CONFIG.model_copy(update={"bucket_step": None})
    return ingested(tmp_path_factory.mktemp("squares"), config)


def samples(images: Path, split: str) -> dict[str, tuple[bytes, dict[str, object]]]:
    """Picture and description of each name."""
    reader = ShardReader(images, split, frozenset({"png", "json"}))
    abouts = {key: json.loads(reader.read(key, "json")) for key in reader}
    return {
        about["url"].partition(f"{split}-")[2]: (reader.read(key, "png"), about)
        for key, about in abouts.items()
    }


def cropped(picture: Image.Image, size: Size) -> np.ndarray:
    """Scaled to cover the size, and the middle of that."""
    scale = max(size[0] / picture.width, size[1] / picture.height)
    way = Image.Resampling.BOX if scale < 1 else Image.Resampling.LANCZOS
    covering = picture.resize((round(scale * picture.width), round(scale * picture.height)), way)
    left, top = (covering.width - size[0]) // 2, (covering.height - size[1]) // 2
    box = (left, top, left + size[0], top + size[1])
    return np.asarray(covering.crop(box)).astype(int)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_pictures_land_in_their_bucket_with_the_right_pixels(images: Path, split: str) -> None:
    found = samples(images, split)
    assert found.keys() == set(NAMES[split])
    for name, (content, about) in found.items():
        width, height = bucket_of(name)
        assert (about["width"], about["height"]) == (width, height)
        pixels = decode_image(content).astype(int)
        assert pixels.shape == (height, width, 3)
        error = np.abs(pixels - cropped(picture_of(split, name), (width, height)))
        assert error.mean() < 1 and error.max() < 8


def test_the_square_bucket_has_the_bytes_that_img2dataset_gives(
    images: Path, squares: Path
) -> None:
    ours, theirs = samples(images, "train"), samples(squares, "train")
    square = [name for name in SIZES if bucket_of(name) == (64, 64)]
    assert len(square) == 5
    assert all(ours[name][0] == theirs[name][0] for name in square)


def test_a_shard_holds_one_size(images: Path) -> None:
    found = []
    for path in sorted(images.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            abouts = [
                json.load(tar.extractfile(member))
                for member in tar
                if member.name.endswith(".json")
            ]
        names = [about["url"].partition("train-")[2] for about in abouts]
        assert len(names) <= CONFIG.samples_per_shard
        width, height = bucket_of(names[0])
        assert path.name.startswith(f"train-{width}x{height}-")
        assert {bucket_of(name) for name in names} == {(width, height)}
        found += names
    assert sorted(found) == NAMES["train"]


def test_the_card_counts_the_buckets(images: Path, squares: Path) -> None:
    lines = (images / "card.md").read_text().splitlines()
    for line in ("| 32x96 | 7 |", "| 64x64 | 7 |", "| 80x48 | 14 |", "| 48x80 | 1 |"):
        assert line in lines
    assert "Smaller than their bucket, and blown up to it: 1." in lines
    assert "## Aspect buckets" not in (squares / "card.md").read_text()


def test_only_an_artifact_with_buckets_says_so(images: Path, squares: Path) -> None:
    assert opening(images, "images", "ingest").config["bucket_step"] == 16
    assert "bucket_step" not in opening(squares, "images", "ingest").config


def test_the_first_stage_wants_squares(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images: has aspect buckets.*ingest.bucket_step"):
        first_stage(FirstStage(), images, tmp_path / "out", tmp_path / "runs")


# --- encode


@pytest.fixture(scope="module")
def latents(images: Path, pipeline: Path) -> Path:
    folder = images.parent
    config = Encode(batch_size=4)
    encode(config, Pretrained(pipeline=str(pipeline)), images, folder / "latents", folder / "runs")
    return folder / "latents"


def test_latents_are_those_of_each_picture(images: Path, latents: Path, pipeline: Path) -> None:
    cache, vae = LatentCache(latents, "train"), load_vae(Source(str(pipeline)))
    reader = ShardReader(images, "train", frozenset({"png", "json"}))
    assert len(cache) == len(reader)
    for sample in range(len(cache)):
        pixels = decode_image(reader.read(cache.key(sample), "png"))[None].copy()
        moments = posterior_moments(vae, pixels, torch.device("cpu"))[0]
        assert tuple(cache.shapes[sample]) == moments.shape
        assert moments.shape == (8, pixels.shape[1] // 8, pixels.shape[2] // 8)
        np.testing.assert_allclose(cache.moments([sample])[0], moments, atol=1e-4)


# --- train


def batches(latents: Path, batch_size: int, **changes: int) -> TrainingBatches:
    cache = LatentCache(latents, "train")
    settings = {"seed": 3, "timesteps": 1000, "caption_dropout": 0.1}
    return TrainingBatches(cache, batch_size=batch_size, **settings, **changes)  # type: ignore[arg-type]


def test_a_step_is_the_same_however_it_is_shared(latents: Path) -> None:
    """Over processes and micro-batches, all of one shape."""
    whole = batches(latents, 8)
    shapes = set()
    for step in range(12):
        parts = [
            batches(latents, 4, accumulation=2, rank=rank, processes=2)[2 * step + half]
            for half in (0, 1)
            for rank in (0, 1)
        ]
        together = torch.cat([part.latents for part in parts])
        assert torch.equal(whole[step].latents, together)
        assert whole.keys(step) == batches(latents, 4, accumulation=2).keys(step)
        shapes.add(together.shape[1:])
    assert len(shapes) >= 3


def run_here(pipeline: Path, latents: Path, folder: Path, **settings: object) -> Path:
    config = Train.model_validate({**SHORT, "mixed_precision": "no", "batch_size": 4, **settings})
    train(config, Pretrained(pipeline=str(pipeline)), latents, folder / "model", folder / "runs")
    return folder / "model"


def test_a_training_stopped_within_an_epoch_ends_in_the_same_bytes(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_here(pipeline, latents, tmp_path / "straight")
    step, shapes = Trainer.step, []

    def stopping(trainer: Trainer, number: int, *others: object) -> object:
        if len(shapes) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        shapes.append(trainer.batches[number].latents.shape)
        return step(trainer, number, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(SystemExit, match="143"):
        run_here(pipeline, latents, tmp_path / "stopped")
    first = len(shapes)
    stopped = run_here(pipeline, latents, tmp_path / "stopped", workers=1)
    assert opening(stopped, "model", "train").files == opening(straight, "model", "train").files
    # The step that the signal came in is taken by the next start.
    assert first == 4 and len(shapes) == SHORT["steps"] + 1
    assert len(set(shapes[:first])) > 1 and len(set(shapes[first:])) > 1


def test_each_shape_is_compiled_by_itself(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.nn.Module.compile
    graphs_alone = partial(compiled, backend="eager")  # No C++, which takes minutes.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(graphs_alone))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    smallest = {"init": "random", "unet": {"widths": [8], "head_width": 8, "norm_groups": 4}}
    # monkeypatch would take the limit away from who compiles later.
    with torch._dynamo.config.patch(recompile_limit=1):
        run_here(pipeline, latents, tmp_path, **smallest, compile=True, sample_every=None, seed=3)
    made = batches(latents, 4)
    shapes = {made[step].latents.shape for step in range(SHORT["steps"])}
    assert len(shapes) > 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(shapes)


@pytest.mark.slow
@pytest.mark.kills
def test_two_processes_go_on_after_a_kill_and_do_what_one_does(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    settings = {"steps": 12, "batch_size": 4, "checkpoint_every": 3}
    two = {**settings, "accelerate": "infra/accelerate/cpu-ddp.yaml"}
    assert launch(pipeline, latents, tmp_path / "one", **settings).wait() == 0
    process = launch(pipeline, latents, tmp_path / "two", **two)
    wait_for(lambda: list(tmp_path.glob("two/runs/*/step-00000003")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for name in ("two", "straight"):
        assert launch(pipeline, latents, tmp_path / name, **two).wait() == 0
    again, straight = (
        opening(tmp_path / name / "model", "model", "") for name in ("two", "straight")
    )
    assert again.files == straight.files
    for name, count in (("loss", 6), ("val_loss", 2)):
        one, other = (logged(tmp_path / run / "model", name) for run in ("one", "two"))
        assert len(one) == count and other == pytest.approx(one, rel=1e-3)


def logged(model: Path, name: str) -> list[float]:
    lines = map(json.loads, (model / "log.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_validation_is_the_same_whatever_the_batch_size(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    losses = []
    for size in (1, 6):
        model = run_here(
            pipeline, latents, tmp_path / str(size), batch_size=size, learning_rate=1e-12, steps=1
        )
        losses.append(json.loads((model / "log.jsonl").read_text().splitlines()[-1]))
    for name in ("val_loss", "val_loss_bands"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-5)


def test_the_report_has_reconstructions_of_every_size(
    images: Path, pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    model = run_here(pipeline, latents, tmp_path, steps=1)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n')
    evaluation = evaluated(pipeline, model, tmp_path / "prompts.jsonl")
    registry = Registry(tracking_uri=f"sqlite:///{tmp_path}/none.db")
    report(registry, images, latents, model, evaluation, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "over 5 pictures" in page
    vae = load_vae(Source(str(model)))
    for name, (content, _) in samples(images, "validation").items():
        pixels = decode_image(content)[None].copy()
        (quality,) = psnr(pixels, reconstruct(vae, pixels, torch.device("cpu")))
        assert f'a {name} caption</span> <b class="number">{quality:.1f} dB' in page


def test_a_random_unet_draws_squares_unasked(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    assert LatentCache(latents, "train").shapes[0].tolist() == [8, 12, 4]
    unet = {"widths": [16, 16], "head_width": 8, "norm_groups": 4}
    model = run_here(pipeline, latents, tmp_path, steps=1, init="random", unet=unet)
    assert json.loads((model / "unet" / "config.json").read_text())["sample_size"] == 8
