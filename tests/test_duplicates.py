"""Pictures that are the same or look the same: by their hashes, and fetched from a real server."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn

from ldm.config import Ingest
from ldm.ingest.duplicates import Kept
from ldm.ingest.perceptual import Lookalikes, perceptual_hash
from ldm.ingest.reasons import RefusedError
from ldm.ingest.rows import Row
from ldm.ingest.stage import ingest
from ldm.shards import ShardReader

CONFIG = Ingest(timeout_s=5, retries=0, threads=4, processes=1, near_duplicates=4)


def photograph(seed: int, side: int = 256) -> Image.Image:
    """Coarse and fine random shapes, as a photograph has them."""
    random = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8)).resize(
                (side, side), Image.Resampling.BICUBIC
            ),
            np.float64,
        )
        for cells in (5, 9, 40)
    ]
    return Image.fromarray(np.average(layers, 0, (5, 3, 1)).astype(np.uint8))


def stored(image: Image.Image, form: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


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
    kept.add(rows[0], b"0", 0b0000)
    with pytest.raises(RefusedError, match="2 of 64 bits from row 0 of train"):
        kept.add(rows[1], b"1", 0b0011)
    kept.add(rows[2], b"2", 0b1111)


def test_without_a_distance_only_content_counts() -> None:
    kept = Kept(None)
    rows = [Row("train", 0, "http://a/0", "words"), Row("validation", 0, "http://a/1", "others")]
    kept.add(rows[0], b"0", None)
    kept.add(rows[1], b"1", None)
    with pytest.raises(RefusedError) as caught:
        kept.add(rows[1], b"0", None)
    assert caught.value.args == ("duplicate content", "same picture as row 0 of train")


# --- the stage


FILES = {
    "/one.png": stored(photograph(1)),
    "/one-packed-otherwise.png": stored(photograph(1), compress_level=1),
    "/one-saved-anew.jpg": stored(photograph(1), "JPEG", quality=40),
    "/one-larger.png": stored(photograph(1).resize((400, 400), Image.Resampling.BICUBIC)),
    "/two.png": stored(photograph(2)),
    "/three.png": stored(photograph(3)),
}


class Files(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = FILES[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def write_list(path: Path, lines: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


def table(images: Path) -> dict[tuple[str, int], tuple[str, str]]:
    with (images / "skipped.csv").open(newline="") as file:
        return {
            (line["split"], int(line["row"])): (line["reason"], line["detail"])
            for line in csv.DictReader(file)
        }


def test_the_first_of_each_picture_stays(server: str, tmp_path: Path) -> None:
    train = ["one", "one-packed-otherwise", "two", "one-larger"]
    write_list(
        tmp_path / "data" / "train.csv",
        [("url", "caption"), *((f"{server}/{name}.png", name) for name in train)],
    )
    validation = ["one-saved-anew.jpg", "three.png", "two.png"]
    write_list(
        tmp_path / "data" / "validation.csv",
        [("url", "caption"), *((f"{server}/{name}", name) for name in validation)],
    )
    out = tmp_path / "images"
    ingest(CONFIG.model_copy(update={"min_yield": 0.1}), tmp_path / "data", out)
    assert ShardReader(out, "train", frozenset({"png", "json"})).keys == ["00000000", "00000002"]
    assert ShardReader(out, "validation", frozenset({"png", "json"})).keys == ["00000001"]
    reasons = {place: reason for place, (reason, _) in table(out).items()}
    assert reasons == {
        ("train", 1): "duplicate content",
        ("train", 3): "near duplicate",
        ("validation", 0): "near duplicate",
        ("validation", 2): "duplicate content",
    }
    assert table(out)["validation", 2][1] == "same picture as row 2 of train"
    report = json.loads((out / "report.json").read_text())
    assert report["skipped"] == {"duplicate content": 2, "near duplicate": 2}
