"""A list over time: rows that come and go, sites that fail, sites that change what they serve."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.artifacts import MANIFEST, digest_tree, opening
from ldm.config import Ingest
from ldm.errors import UserError
from ldm.ingest.basis import Basis
from ldm.ingest.blocklist import Blocklist
from ldm.ingest.listed import Listed
from ldm.ingest.reasons import RefusedError
from ldm.ingest.repack import repack
from ldm.ingest.results import Fetched, Result
from ldm.ingest.rows import Row, key_of
from ldm.ingest.stage import ingest
from ldm.ingest.store import Store
from ldm.locks import held
from ldm.shards import ShardReader
from tests.served import left_out, photograph, serving, stored, write_list

CONFIG = Ingest(
    timeout_s=2, retries=0, threads=4, processes=1, samples_per_shard=4, min_yield=0.2
)  # fmt: skip
FILES = {f"{number}.png": stored(photograph(number, 64)) for number in range(24)}


class Project:
    """Lists, what was made of them, and what runs leave."""

    def __init__(self, folder: Path, server: str, asked: list[str]) -> None:
        self.folder, self.server, self.asked = folder, server, asked
        self.data, self.out, self.runs = (folder / name for name in ("data", "images", "runs"))

    def list(self, train: Sequence[str], pins: Mapping[str, str] | None = None) -> None:
        pins = pins or {}
        rows = [(f"{self.server}/{name}", f"the {name}", pins.get(name, "")) for name in train]
        write_list(self.data / "train.csv", "url,caption,sha256", rows)
        valid = [(f"{self.server}/{name}", name) for name in ("22.png", "23.png")]
        write_list(self.data / "validation.csv", "url,caption", valid)

    def ingest(self, *, refetch: bool = False, config: Ingest = CONFIG) -> list[str]:
        """As DVC does it, the earlier output is gone; what was asked for."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.asked.clear()
        ingest(config, self.data, self.out, self.runs, refetch=refetch)
        return sorted(self.asked)

    def assert_as_if_clean(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as clean:
            out = Path(clean) / "images"
            ingest(CONFIG, self.data, out, Path(clean) / "runs")
            assert digest_tree(self.out) == digest_tree(out)
            assert (self.out / MANIFEST).read_bytes() == (out / MANIFEST).read_bytes()

    def skipped(self) -> dict[str, tuple[str, str]]:
        """Name of the file to reason and detail."""
        with (self.data / "train.csv").open(newline="") as file:
            names = [line["url"].rpartition("/")[2] for line in csv.DictReader(file)]
        found = left_out(self.out)
        return {names[row]: why for (split, row), why in found.items() if split == "train"}

    def fetched(self) -> dict[str, str]:
        """Name of the file to its sha256."""
        with (self.out / "fetched.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        return {line["url"].rpartition("/")[2]: line["sha256"] for line in lines}

    def holds(self, name: str) -> bool:
        """Whether any file holds some piece of what became of that picture."""
        content = self.sample_of[name]
        pieces = [content[at : at + 64] for at in range(100, len(content) - 64, 500)]
        files = [*self.runs.rglob("*"), *self.out.rglob("*")]
        contents = [path.read_bytes() for path in files if path.is_file()]
        return any(piece in content for content in contents for piece in pieces)

    def remember_samples(self) -> None:
        samples = ShardReader(self.out, "train", frozenset({"png", "json"}))
        keys = {json.loads(samples.read(key, "json"))["url"]: key for key in samples}
        self.sample_of = {
            url.rpartition("/")[2]: samples.read(key, "png") for url, key in keys.items()
        }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def names(*numbers: int) -> list[str]:
    return [f"{number}.png" for number in numbers]


@pytest.mark.slow
def test_rows_come_and_go_and_sites_recover(tmp_path: Path) -> None:
    files: dict[str, bytes | int] = {**FILES, "flaky.png": 503, "slow.png": 429}
    asked: list[str] = []
    with serving(files, asked=asked) as server:
        project = Project(tmp_path, server, asked)
        project.list([*names(*range(12)), "missing.png", "flaky.png", "slow.png"])
        assert len(project.ingest()) == 17
        assert {name: why[0] for name, why in project.skipped().items()} == {
            "missing.png": "http 404",
            "flaky.png": "http 503",
            "slow.png": "http 429",
        }
        assert project.fetched() == {
            name: sha256(FILES[name]) for name in names(*range(12), 22, 23)
        }
        project.remember_samples()
        before = opening(project.out, "images", "ingest").files

        # What is gone is nowhere, and what changed is where it was.
        assert project.holds("5.png")
        project.list([*names(0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11), "missing.png", "flaky.png"])
        files["flaky.png"] = stored(photograph(50, 64))
        assert project.ingest() == ["flaky.png"]
        assert not project.holds("5.png")
        assert project.holds("6.png")
        after = opening(project.out, "images", "ingest").files
        shards = {content for name, content in before.items() if name.endswith(".tar")}
        gone = shards - set(after.values())
        assert len(shards) > 4
        assert 1 <= len(gone) <= 3  # That of 5.png, and the last, in which flaky.png now is.
        project.assert_as_if_clean()

        # New rows, one before all others; a caption; another order.
        project.list([*names(13, 0, 1, 2, 3, 4, 6, 9, 8, 7, 10, 11, 12, 14), "flaky.png"])
        assert project.ingest() == ["12.png", "13.png", "14.png"]
        project.assert_as_if_clean()
        same = digest_tree(project.out)
        assert project.ingest() == []
        assert digest_tree(project.out) == same


@pytest.mark.slow
def test_a_refetch_finds_out_who_changed(tmp_path: Path) -> None:
    files: dict[str, bytes | int] = dict(FILES)
    asked: list[str] = []
    with serving(files, asked=asked) as server:
        project = Project(tmp_path, server, asked)
        project.list(names(0, 1, 2, 3, 4))
        project.ingest()
        project.remember_samples()
        files["1.png"], files["2.png"], files["3.png"] = FILES["20.png"], 404, 503
        assert project.ingest() == []
        assert not project.skipped()

        assert project.ingest(refetch=True) == sorted(names(0, 1, 2, 3, 4, 22, 23))
        new, old = sha256(FILES["20.png"]), sha256(FILES["1.png"])
        changed = "changed content", f"sha256 is {new}, was {old[:12]}..."
        assert project.skipped()["1.png"] == changed
        assert {name: why for name, (why, _) in project.skipped().items()} == {
            "1.png": "changed content",
            "2.png": "http 404",
        }
        report = json.loads((project.out / "report.json").read_text())
        assert report["skipped"] == {"changed content": 1, "http 404": 1}
        assert not project.holds("1.png")
        assert project.fetched()["1.png"] == old

        # It stays so, ...
        assert project.ingest() == ["1.png"]
        assert project.skipped()["1.png"] == changed
        # ... on a machine that knows the hashes from the list alone too, ...
        project.list(names(0, 1, 2, 3, 4), pins=project.fetched())
        shutil.rmtree(project.runs)
        files["3.png"] = FILES["3.png"]
        project.ingest()
        detail = f"sha256 is {new}, the list says {old[:12]}..."
        assert project.skipped()["1.png"] == ("changed content", detail)
        # ... until the list says that the new content is right.
        project.list(names(0, 1, 2, 3, 4), pins={"1.png": new.upper()})
        assert project.ingest() == ["1.png"]
        assert set(project.skipped()) == {"2.png"}
        project.assert_as_if_clean()


def test_another_crop_is_fetched_under_the_first_hashes(tmp_path: Path) -> None:
    files: dict[str, bytes | int] = dict(FILES)
    asked: list[str] = []
    with serving(files, asked=asked) as server:
        project = Project(tmp_path, server, asked)
        project.list(names(0, 1, 2))
        project.ingest()
        files["1.png"] = FILES["20.png"]
        smaller = CONFIG.model_copy(update={"image_size": 32})
        assert len(project.ingest(config=smaller)) == 5
        assert project.skipped()["1.png"][0] == "changed content"


def test_a_failed_run_costs_nothing_and_the_next_asks_again(tmp_path: Path) -> None:
    files: dict[str, bytes | int] = dict(FILES)
    asked: list[str] = []
    with serving(files, asked=asked) as server:
        project = Project(tmp_path, server, asked)
        project.list(names(0, 1, 2))
        project.ingest()
        same = digest_tree(project.out)
        for name in names(0, 1, 2):
            files[name] = 404
        for refetch in (True, True):
            asked.clear()
            with pytest.raises(UserError, match=r"0 of 3 rows kept.*mostly http 404 \(3 rows"):
                ingest(CONFIG, project.data, project.out, project.runs, refetch=refetch)
            assert set(names(0, 1, 2)) <= set(asked)
            assert digest_tree(project.out) == same
        assert project.ingest() == []
        assert digest_tree(project.out) == same


def test_a_blocked_picture_is_in_no_store(tmp_path: Path) -> None:
    asked: list[str] = []
    with serving(FILES, asked=asked) as server:
        project = Project(tmp_path, server, asked)
        project.list(names(0, 1, 2))
        project.ingest()
        project.remember_samples()
        blocked = tmp_path / "blocked.txt"
        blocked.write_text(sha256(FILES["1.png"]))
        strict = CONFIG.model_copy(update={"blocked": str(blocked)})
        project.ingest(config=strict)
        assert project.skipped()["1.png"][0] == "blocked"
        assert not project.holds("1.png")
        assert project.holds("2.png")
        assert project.ingest(config=strict) == ["1.png"]


def test_a_row_that_sits_a_run_out_is_still_held_to_its_first_file(tmp_path: Path) -> None:
    files: dict[str, bytes | int] = dict(FILES)
    with serving(files) as server:
        project = Project(tmp_path, server, [])
        project.list(names(0, 1, 2))
        project.ingest()
        rows = [(f"{server}/{one}", one, "0.9" if one == "1.png" else "0") for one in names(0, 1)]
        write_list(project.data / "train.csv", "url,caption,punsafe", rows)
        valid = [(f"{server}/22.png", "words", "0")]
        write_list(project.data / "validation.csv", "url,caption,punsafe", valid)
        project.ingest(config=CONFIG.model_copy(update={"max_punsafe": 0.5}))
        assert project.skipped()["1.png"][0] == "punsafe too high"
        files["1.png"], files["2.png"] = FILES["20.png"], FILES["21.png"]
        project.list(names(0, 1, 2))
        project.ingest()
    # What had left the list has no past.
    assert {name: why for name, (why, _) in project.skipped().items()} == {
        "1.png": "changed content"
    }


def test_a_url_in_both_lists_is_asked_once(tmp_path: Path) -> None:
    asked: list[str] = []
    with serving(FILES, asked=asked) as server:
        project = Project(tmp_path, server, asked)
        project.list(names(0, 22))
        assert project.ingest() == ["0.png", "22.png", "23.png"]
        assert left_out(project.out) == {
            ("validation", 0): ("duplicate content", "same picture as row 1 of train")
        }
        project.list(names(0))
        assert project.ingest() == []
        assert left_out(project.out) == {}


def test_one_ingest_at_a_time(tmp_path: Path) -> None:
    project = Project(tmp_path, "http://127.0.0.1:9", [])
    project.list(names(0))
    with (
        held(project.runs / "fetched" / "lock", ""),
        pytest.raises(UserError, match=r"runs: another `ldm ingest` uses it; wait, or give"),
    ):
        project.ingest()
    with (
        held(tmp_path / ".images.lock", ""),
        pytest.raises(UserError, match=r"images: another process makes it; wait"),
    ):
        project.ingest()


def test_a_bad_hash_in_a_list_is_named(tmp_path: Path) -> None:
    project = Project(tmp_path, "http://127.0.0.1:9", [])
    project.list(names(0), pins={"0.png": "abc"})
    with pytest.raises(UserError, match=r"bad sha256 \(1 rows, such as row 0: 'abc' is not 64"):
        project.ingest()


# --- any history

URLS = 14
PICTURES = [stored(photograph(100 + seed, 8)) for seed in range(URLS)]
RUN = st.tuples(
    st.lists(st.integers(0, URLS - 1), unique=True, min_size=1),  # The list.
    st.sets(st.integers(0, URLS - 1)),  # Sites that fail for a passing reason.
    st.integers(0, URLS),  # After so many results the run is killed.
    st.booleans(),  # Whether all are asked.
)


def gives(number: int, failing: set[int]) -> Result:
    """What a URL gives: every fourth is not there."""
    if number in failing:
        return RefusedError("timeout")
    if number % 4 == 3:
        return RefusedError("http 404")
    return Fetched(sha256(PICTURES[number]), 8, 8, partial(PICTURES.__getitem__, number))


def run(
    store: Store, numbers: Sequence[int], failing: set[int], taken: int, out: Path
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """One run without its downloads; digests of the shards, and rows with reasons."""
    rows = [Row("train", at, f"http://a/{one}", f"the {one}") for at, one in enumerate(numbers)]
    asked = [row for row in rows if not store.knows(row)]
    for row in asked[:taken]:
        store.take([(row, gives(numbers[row.number], failing))])
    if taken < len(asked):
        return {}, []
    config = CONFIG.model_copy(update={"image_size": 8})
    listed = Listed()
    listed.take(rows, config)
    repack(listed, store, Blocklist(), out, config)
    store.finish(rows, [])
    return digest_tree(out), [(skip.row.url, skip.reason) for skip in listed.left_out()]


@settings(max_examples=15)
@given(st.lists(RUN, max_size=4), st.lists(st.integers(0, URLS - 1), unique=True, min_size=1))
def test_after_any_history_a_run_ends_as_a_clean_one(
    history: list[tuple[list[int], set[int], int, bool]], last: list[int]
) -> None:
    basis = Basis("one", "two")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, (numbers, failing, taken, refetch) in enumerate(history):
            with Store(folder / "warm", basis, refetch=refetch) as store:
                (out := folder / f"{number}").mkdir()
                run(store, numbers, failing, taken, out)
        results = []
        for name in ("warm", "clean"):
            with Store(folder / name, basis) as store:
                (out := folder / f"{name} out").mkdir()
                results.append(run(store, last, set(), URLS, out))
        assert results[0] == results[1]
        assert results[0][0] or all(number % 4 == 3 for number in last)
        size = {name: (folder / name / "fetched.db").stat().st_size for name in ("warm", "clean")}
        assert size["warm"] <= size["clean"] + 2 * 4096


def test_keys_are_of_the_plain_url() -> None:
    assert key_of("http://a/图") == key_of("http://a/%E5%9B%BE#part") != key_of("http://a/b")
    assert key_of("http://a/b") == sha256(b"http://a/b")[:32]
    for host in ("bücher.de", "BÜCHER.de.", "图片。中国", "пример.рф", "παράδειγμα.gr", "a.日本"):
        plain = f"http://{host.encode('idna').decode().lower()}/b"
        assert key_of(f"http://{host}/b") == sha256(plain.encode())[:32]
    with pytest.raises(UserError, match="'ftp://a/b': is no URL; write http://HOST"):
        key_of("ftp://a/b")
