"""Pictures that are the same or look the same: by their hashes, and fetched from a real server."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn

from ldm.config import Ingest
from ldm.ingest.duplicates import Kept
from ldm.ingest.perceptual import Lookalikes, perceptual_hash
from ldm.ingest.reasons import RefusedError
from ldm.ingest.rows import Row, key_of
from ldm.ingest.stage import ingest
from ldm.shards import ShardReader
from tests.served import left_out, photograph, serving, stored, write_list

CONFIG = Ingest(timeout_s=5, retries=0, threads=4, processes=1, near_duplicates=4, min_yield=0.1)


def apart(one: Image.Image, other: Image.Image) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


# --- the hash


@pytest.mark.parametrize("seed", range(20))
def test_hash_is_the_sign_of_the_low_dct_coefficients(seed: int) -> None:
    image = photograph(seed)
    small = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(small, float))[:8, :8].flatten()
    bits = "".join("1" if value > np.median(low) else "0" for value in low)
    assert f"{perceptual_hash(image):064b}" == bits


@pytest.mark.parametrize("seed", range(20))
def test_hash_bears_what_happens_to_a_picture_on_its_way(seed: int) -> None:
    image = photograph(seed)
    jpeg = Image.open(io.BytesIO(stored(image, "JPEG", quality=30)))
    assert apart(image, jpeg) <= 4
    assert apart(image, image.resize((90, 90))) <= 4
    assert apart(image, ImageEnhance.Brightness(image).enhance(0.8)) <= 4


def test_hash_tells_pictures_apart() -> None:
    hashes = [perceptual_hash(photograph(seed)) for seed in range(60)]
    bits = [(a ^ b).bit_count() for at, a in enumerate(hashes) for b in hashes[:at]]
    assert min(bits) > 12
    assert 30 < np.mean(bits) < 33
    image = photograph(0)
    assert apart(image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > 12


@pytest.mark.parametrize("colour", ["black", "white", "#335577"])
def test_an_even_picture_has_no_random_bits(colour: str) -> None:
    assert perceptual_hash(Image.new("RGB", (64, 64), colour)) in (0, 1 << 63)
    assert apart(Image.new("RGB", (64, 64), colour), Image.new("RGB", (64, 64), "red")) <= 1


# --- the search


@pytest.mark.parametrize("distance", [0, 1, 4, 9])
def test_search_finds_the_first_within_the_distance(distance: int) -> None:
    random = np.random.default_rng(distance)
    looks, known = Lookalikes(distance), []
    for _ in range(600):
        value = int(random.integers(0, 2**64, dtype=np.uint64))
        if known and random.random() < 0.7:
            value = known[random.integers(len(known))]
            for bit in random.integers(0, 64, random.integers(0, 12)):
                value ^= 1 << int(bit)
        near = [(at, (value ^ one).bit_count()) for at, one in enumerate(known)]
        expected = next((pair for pair in near if pair[1] <= distance), None)
        assert looks.find(value) == expected
        looks.add(value)
        known.append(value)


def test_what_was_left_out_leaves_nothing_else_out() -> None:
    """Else a chain of small changes would drop pictures that look like none that is kept."""
    kept = Kept(2)
    rows = [Row("train", at, f"http://a/{at}", "words") for at in range(3)]
    kept.add(rows[0], "0" * 64, 0b0000)
    with pytest.raises(RefusedError, match="2 of 64 bits from row 0 of train"):
        kept.add(rows[1], "1" * 64, 0b0011)
    kept.add(rows[2], "2" * 64, 0b1111)


def test_without_a_distance_only_content_counts() -> None:
    kept = Kept(None)
    rows = [Row("train", 0, "http://a/0", "words"), Row("validation", 0, "http://a/1", "others")]
    kept.add(rows[0], "0" * 64, None)
    kept.add(rows[1], "1" * 64, None)
    with pytest.raises(RefusedError) as caught:
        kept.add(rows[1], "0" * 64, None)
    assert caught.value.args == ("duplicate content", "same picture as row 0 of train")


# --- the stage


FILES = {
    "one.png": stored(photograph(1)),
    "one-packed-otherwise.png": stored(photograph(1), compress_level=1),
    "one-saved-anew.jpg": stored(photograph(1), "JPEG", quality=40),
    "one-larger.png": stored(photograph(1).resize((400, 400), Image.Resampling.BICUBIC)),
    "two.png": stored(photograph(2)),
    "three.png": stored(photograph(3)),
}


def test_the_first_of_each_picture_stays(tmp_path: Path) -> None:
    lists = {
        "train": ["one.png", "one-packed-otherwise.png", "two.png", "one-larger.png"],
        "validation": ["one-saved-anew.jpg", "three.png", "two.png"],
    }
    out = tmp_path / "images"
    with serving(FILES) as server:
        for split, names in lists.items():
            rows = [(f"{server}/{name}", name) for name in names]
            write_list(tmp_path / "data" / f"{split}.csv", "url,caption", rows)
        ingest(CONFIG, tmp_path / "data", out, tmp_path / "runs")
    samples = ShardReader(out, "train", frozenset({"png", "json"}))
    one, two, three = (key_of(f"{server}/{name}.png") for name in ("one", "two", "three"))
    assert samples.keys == sorted([one, two])
    assert ShardReader(out, "validation", frozenset({"png", "json"})).keys == [three]
    found = left_out(out)
    assert {place: reason for place, (reason, _) in found.items()} == {
        ("train", 1): "duplicate content",
        ("train", 3): "near duplicate",
        ("validation", 0): "near duplicate",
        ("validation", 2): "duplicate content",
    }
    assert found["validation", 2][1] == "same picture as row 2 of train"
    report = json.loads((out / "report.json").read_text())
    assert report["skipped"] == {"duplicate content": 2, "near duplicate": 2}
    hashed = perceptual_hash(Image.open(io.BytesIO(samples.read(two, "png"))))
    assert json.loads(samples.read(two, "json"))["phash"] == f"{hashed:016x}"
