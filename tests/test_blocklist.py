"""Pictures that must not become samples: the list of their hashes, and a stage that reads it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ldm.artifacts import digest_file, opening
from ldm.config import Ingest
from ldm.errors import UserError
from ldm.ingest.blocklist import Blocklist, read_blocklist
from ldm.ingest.perceptual import perceptual_hash
from ldm.ingest.reasons import RefusedError
from ldm.ingest.repack import Sieve
from ldm.ingest.results import Fetched
from ldm.ingest.rows import Row, key_of
from ldm.ingest.stage import ingest
from ldm.shards import ShardReader
from tests.served import left_out, photograph, serving, stored, write_list

CONFIG = Ingest(timeout_s=5, retries=0, threads=4, processes=1, min_yield=0.1)
CONTENT = "5f" * 32


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "blocked.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def detail(blocked: Blocklist, contents: list[str], look: int | None) -> str:
    with pytest.raises(RefusedError) as caught:
        blocked.refuse(contents, look)
    assert caught.value.reason == "blocked"
    return caught.value.detail


def test_hashes_block_by_content_or_look(tmp_path: Path) -> None:
    text = f"\ufeff# ours\n\n  {CONTENT.upper()}  # a picture\n00000000000000ff\n{CONTENT}\n"
    blocked = read_blocklist(written(tmp_path, text), 2)
    assert detail(blocked, ["0" * 64, CONTENT], None) == "line 3: same content"
    assert detail(blocked, ["0" * 64], 0xFC) == "line 4: 2 of 64 bits from it"
    blocked.refuse(["0" * 64], 0xF8)
    Blocklist().refuse([CONTENT], 0xFF)


@pytest.mark.parametrize(
    ("text", "distance", "words"),
    [
        (f"{CONTENT}\n{CONTENT[:-1]}\n", 4, r"blocked\.txt: line 2 is no hash .*write 64 hexa"),
        (f"{CONTENT} {CONTENT}", 4, "line 1 is no hash"),
        ("# one\n" + "g" * 64, 4, "line 2 is no hash"),
        ("0123456789abcdef", None, "line 1 is a perceptual hash; set ingest.near_duplicates"),
        (b"\xff\xfe", 4, r"blocked\.txt: is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, text: str | bytes, distance: int | None, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_blocklist(written(tmp_path, text), distance)
    assert "\n" not in str(caught.value)


def test_a_missing_list_stops_the_stage_before_a_download(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_list(tmp_path / "data" / f"{split}.csv", "url,caption", [("http://a/b", "words")])
    config = CONFIG.model_copy(update={"blocked": str(tmp_path / "none.txt")})
    with pytest.raises(UserError, match=r"none\.txt: cannot be read .*mend ingest\.blocked"):
        ingest(config, tmp_path / "data", tmp_path / "out", tmp_path / "runs")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_hash_of_a_sample_blocks_it() -> None:
    """Of what a sample's json says, so that a sample once seen can be listed."""
    content = stored(photograph(2, 64))
    fetched = Fetched(CONTENT, 64, 64, lambda: content)
    row = Row("train", 0, "http://a/b", "words")
    about = Sieve(CONFIG, Blocklist()).sample(row, fetched, (64, 64))()["json"]
    sha256 = json.loads(about)["sha256"]
    for blocked in (sha256, CONTENT):
        with pytest.raises(RefusedError, match="line 1: same content"):
            Sieve(CONFIG, Blocklist({blocked: 1})).sample(row, fetched, (64, 64))


def test_listed_pictures_become_no_samples(tmp_path: Path) -> None:
    files = {
        "good.png": stored(photograph(0)),
        "listed.jpg": stored(photograph(1), "JPEG"),
        "like-it.png": stored(photograph(1).resize((200, 200))),
        "looks-listed.jpg": stored(photograph(3), "JPEG", quality=40),
        "other.png": stored(photograph(4)),
    }
    content = hashlib.sha256(files["listed.jpg"]).hexdigest()
    blocked = written(tmp_path, f"{content}\n{perceptual_hash(photograph(3)):016x} # seen\n")
    config = CONFIG.model_copy(update={"blocked": str(blocked), "near_duplicates": 4})
    with serving(files) as server:
        urls = [(f"{server}/{name}", name) for name in files]
        write_list(tmp_path / "data" / "train.csv", "url,caption", urls[:-1])
        write_list(tmp_path / "data" / "validation.csv", "url,caption", urls[-1:])
        ingest(config, tmp_path / "data", tmp_path / "images", tmp_path / "runs")
    found = left_out(tmp_path / "images")
    assert {place: reason for place, (reason, _) in found.items()} == {
        ("train", 1): "blocked",
        ("train", 3): "blocked",
    }
    assert found["train", 1][1] == "line 1: same content"
    assert found["train", 3][1].startswith("line 2: ")
    samples = ShardReader(tmp_path / "images", "train", frozenset({"png", "json"}))
    assert samples.keys == sorted(
        key_of(f"{server}/{name}") for name in ("good.png", "like-it.png")
    )
    manifest = opening(tmp_path / "images", "images", "ingest")
    assert manifest.inputs["blocked"] == digest_file(blocked)
    assert "blocked" not in manifest.config
