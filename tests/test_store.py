"""What is known of a URL, for how long, and what is left of it: the store of fetched pictures."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.config import Ingest
from ldm.errors import UserError
from ldm.ingest import basis, store
from ldm.ingest.basis import MAKING, REFUSING, Basis, basis_of
from ldm.ingest.reasons import RefusedError
from ldm.ingest.results import Fetched, Result
from ldm.ingest.rows import Row
from ldm.ingest.store import FILE, Store
from tests.test_layout import ROOT, imports

BASIS = Basis("picture", "refusal")
ONE, TWO = "1" * 64, "2" * 64
ROW = Row("train", 0, "http://a/b", "words")
OTHER = Row("validation", 0, "http://a/c", "words")


def picture(sha256: str = ONE, seed: int = 0, size: int = 20_000) -> Fetched:
    content = np.random.default_rng(seed).bytes(size)
    return Fetched(sha256, 640, 480, lambda: content)


def pinned(sha256: str) -> Row:
    return Row("train", 0, ROW.url, "words", sha256=sha256)


def outcome(known: Store, row: Row) -> str:
    """The sha256 of the row's picture, or why there is none."""
    try:
        return known.fetched(row).sha256
    except RefusedError as refusal:
        return refusal.reason


@contextmanager
def finished(folder: Path, *results: tuple[Row, Result], **options: Any) -> Iterator[Store]:
    """A run that takes these results and then ends well."""
    with Store(folder, BASIS, **options) as known:
        known.take(results)
        yield known
        known.finish([ROW, OTHER], [])


def test_a_picture_comes_back_as_it_was(tmp_path: Path) -> None:
    with finished(tmp_path, (ROW, picture())) as known:
        assert known.asked == 1
    with Store(tmp_path, BASIS) as known:
        assert known.knows(ROW) and not known.knows(OTHER)
        found = known.fetched(ROW)
        assert found == picture() and found.read() == picture().read()
        assert known.first(ROW) == ONE
        assert known.asked == 0


@pytest.mark.parametrize(
    ("reason", "lasts"),
    [
        ("http 404", True), ("http 410", True), ("not an image", True), ("truncated", True),
        ("closed address", True), ("not allowed by its site", True), ("bad certificate", True),
        ("timeout", False), ("unreachable", False), ("connection lost", False),
        ("http 408", False), ("http 425", False), ("http 429", False), ("http 503", False),
        ("download failed", False), ("no result", False),
    ],
)  # fmt: skip
def test_what_may_pass_is_asked_again(tmp_path: Path, reason: str, lasts: bool) -> None:
    with finished(tmp_path, (ROW, RefusedError(reason, "words"))) as known:
        with pytest.raises(RefusedError) as caught:
            known.fetched(ROW)
        assert (caught.value.reason, caught.value.detail) == (reason, "words")
    with Store(tmp_path, BASIS) as known:
        assert known.knows(ROW) == lasts
        assert outcome(known, ROW) == (reason if lasts else "no result")


def test_a_run_that_was_killed_leaves_what_it_took(tmp_path: Path) -> None:
    with Store(tmp_path, BASIS) as known:
        known.take([(ROW, picture())])
    with Store(tmp_path, BASIS) as known:
        assert known.knows(ROW)


def test_a_shard_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    def results() -> Iterator[tuple[Row, Result]]:
        yield ROW, picture()
        raise KeyboardInterrupt

    with Store(tmp_path, BASIS) as known:
        with pytest.raises(KeyboardInterrupt):
            known.take(results())
        assert not known.knows(ROW)


def test_a_refetch_asks_what_was_not_asked_since_the_last_finished_run(tmp_path: Path) -> None:
    with finished(tmp_path, (ROW, picture()), (OTHER, RefusedError("http 404"))):
        pass
    with Store(tmp_path, BASIS, refetch=True) as known:
        assert not known.knows(ROW) and not known.knows(OTHER)
        known.take([(ROW, picture())])
    with Store(tmp_path, BASIS, refetch=True) as known:  # As if it had been killed.
        assert known.knows(ROW) and not known.knows(OTHER)
        known.take([(OTHER, picture(TWO))])
        known.finish([ROW, OTHER], [])
    with Store(tmp_path, BASIS) as known:
        assert known.knows(ROW) and outcome(known, OTHER) == TWO
    with Store(tmp_path, BASIS, refetch=True) as known:
        assert not known.knows(ROW)


def test_a_refetch_that_cannot_reach_a_site_changes_nothing(tmp_path: Path) -> None:
    with finished(tmp_path, (ROW, picture())):
        pass
    with finished(tmp_path, (ROW, RefusedError("timeout")), refetch=True) as known:
        assert outcome(known, ROW) == ONE
    with Store(tmp_path, BASIS) as known:
        assert known.fetched(ROW).read() == picture().read()


def test_what_is_gone_at_a_refetch_is_gone(tmp_path: Path) -> None:
    with finished(tmp_path, (ROW, picture())):
        pass
    with finished(tmp_path, (ROW, RefusedError("http 404")), refetch=True) as known:
        assert outcome(known, ROW) == "http 404"
    with Store(tmp_path, BASIS) as known:
        assert outcome(known, ROW) == "http 404"
        assert known.first(ROW) == ONE
    assert not traces(tmp_path, picture().read())


def test_a_run_that_fails_for_its_refusals_forgets_them(tmp_path: Path) -> None:
    with finished(tmp_path, (ROW, picture())):
        pass
    with Store(tmp_path, BASIS, refetch=True) as known:
        known.take([(ROW, RefusedError("http 404")), (OTHER, picture(TWO))])
        assert outcome(known, ROW) == "http 404"
        known.forget_refusals()
    with Store(tmp_path, BASIS) as known:
        assert (outcome(known, ROW), outcome(known, OTHER)) == (ONE, TWO)
    with Store(tmp_path, BASIS, refetch=True) as known:
        assert not known.knows(ROW) and known.knows(OTHER)


# --- trust


def test_other_content_than_the_first_is_not_trusted(tmp_path: Path) -> None:
    with finished(tmp_path, (ROW, picture(ONE, 1))):
        pass
    with Store(tmp_path, BASIS, refetch=True) as known:
        known.take([(ROW, picture(TWO, 2))])
        with pytest.raises(RefusedError) as caught:
            known.fetched(ROW)
        detail = f"sha256 is {TWO}, was {ONE[:12]}..."
        assert (caught.value.reason, caught.value.detail) == ("changed content", detail)
        known.finish([ROW], untrusted=[ROW])
    for seed in (1, 2):
        assert not traces(tmp_path, picture(seed=seed).read())
    with Store(tmp_path, BASIS) as known:  # It is asked again, and may be what it was.
        assert not known.knows(ROW) and known.first(ROW) == ONE
        known.take([(ROW, picture(ONE, 1))])
        assert outcome(known, ROW) == ONE


def test_the_first_hash_outlives_the_settings(tmp_path: Path) -> None:
    """A list is fetched again for another crop, by which time a site may be another's."""
    with finished(tmp_path, (ROW, picture())):
        pass
    with Store(tmp_path, Basis("other", "another")) as known:
        assert not known.knows(ROW)
        known.take([(ROW, picture(TWO))])
        assert outcome(known, ROW) == "changed content"


def test_a_list_may_vouch_for_new_content(tmp_path: Path) -> None:
    with finished(tmp_path, (ROW, picture())):
        pass
    with Store(tmp_path, BASIS) as known:
        assert known.knows(pinned(ONE)) and not known.knows(pinned(TWO))
        assert outcome(known, pinned(TWO)) == "changed content"
        known.take([(pinned(TWO), picture(TWO))])
        assert outcome(known, pinned(TWO)) == TWO
        known.finish([pinned(TWO)], [])
    with Store(tmp_path, BASIS) as known:
        assert known.knows(ROW) and known.first(ROW) == TWO


def test_a_list_that_vouches_is_held_to_it_at_the_first_fetch(tmp_path: Path) -> None:
    with Store(tmp_path, BASIS) as known:
        known.take([(pinned(ONE), picture(TWO))])
        with pytest.raises(RefusedError, match=f"the list says {ONE[:12]}"):
            known.fetched(pinned(ONE))
        assert known.first(ROW) is None


# --- what is left


def traces(folder: Path, content: bytes) -> bool:
    """Whether some piece of the content is in some file; a page of the database holds 4 KiB."""
    pieces = [content[at : at + 64] for at in range(100, len(content) - 64, 997)]
    return any(
        piece in path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        for piece in pieces
    )


def test_what_is_no_longer_listed_is_overwritten(tmp_path: Path) -> None:
    with finished(tmp_path, (ROW, picture(ONE, 1)), (OTHER, picture(TWO, 2))):
        pass
    size = (tmp_path / FILE).stat().st_size
    assert traces(tmp_path, picture(seed=1).read())
    with Store(tmp_path, BASIS) as known:
        known.finish([OTHER], [])
        assert known.first(ROW) is None and known.first(OTHER) == TWO
    assert not traces(tmp_path, picture(seed=1).read())
    assert traces(tmp_path, picture(seed=2).read())
    assert (tmp_path / FILE).stat().st_size < size - 16_000


def test_pictures_of_other_settings_are_kept_until_a_run_has_finished(tmp_path: Path) -> None:
    with finished(tmp_path, (ROW, picture(ONE, 1))):
        pass
    other = Basis("other", "another")
    with Store(tmp_path, other) as known:
        known.take([(ROW, picture(ONE, 2))])
    with Store(tmp_path, BASIS) as known:
        assert known.fetched(ROW).read() == picture(seed=1).read()
    with Store(tmp_path, other) as known:
        assert known.fetched(ROW).read() == picture(seed=2).read()
        known.finish([ROW], [])
    assert not traces(tmp_path, picture(seed=1).read())
    assert traces(tmp_path, picture(seed=2).read())


def test_results_of_settings_that_were_given_up_replace_nothing(tmp_path: Path) -> None:
    with finished(tmp_path, (ROW, picture(ONE, 1))):
        pass
    with Store(tmp_path, Basis("other", "another")) as known:
        known.take([(ROW, picture(ONE, 2))])
    with finished(tmp_path) as known:
        assert known.knows(ROW)
    with Store(tmp_path, BASIS) as known:
        assert known.fetched(ROW).read() == picture(seed=1).read()
    assert not traces(tmp_path, picture(seed=2).read())


# --- damage


def test_a_damaged_picture_is_asked_for_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with finished(tmp_path, (ROW, picture(ONE, 1)), (OTHER, picture(TWO, 2))):
        pass
    content = (tmp_path / FILE).read_bytes()
    at = content.index(picture(seed=1).read()[1000:1064])
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    (tmp_path / FILE).write_bytes(flipped)
    with Store(tmp_path, BASIS) as known:
        assert not known.knows(ROW) and known.knows(OTHER)
        assert known.first(ROW) == ONE
    assert "1 pictures are damaged; they are fetched again" in capsys.readouterr().out


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"something else" * 100)
    with pytest.raises(UserError, match=rf"{FILE}: is damaged .*remove it") as caught:
        Store(tmp_path, BASIS)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with finished(tmp_path, (ROW, picture())):
        pass
    pages = (tmp_path / FILE).stat().st_size // 4096 + 2
    monkeypatch.setattr(store, "SETTINGS", f"{store.SETTINGS} PRAGMA max_page_count = {pages};")
    with Store(tmp_path, BASIS) as known:
        with pytest.raises(UserError, match=r"cannot be used \(database or disk is full\); make"):
            known.take([(OTHER, picture(TWO))])
        assert known.fetched(ROW).read() == picture().read()


def test_there_is_no_journal_after_a_run(tmp_path: Path) -> None:
    with finished(tmp_path, (ROW, picture())):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    with sqlite3.connect(tmp_path / FILE) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# --- what decides a result


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 32}, {"image_format": "jpg"}, {"image_format": "jpg", "quality": 90},
        {"min_side": 65}, {"max_aspect": 3.0}, {"max_pixels": 1000}, {"background": "black"},
        {"animations": "skip"}, {"formats": ("png",)}, {"user_agent": "other"},
        {"allow_addresses": ()}, {"max_bytes": 1000}, {"bucket_step": 16},
    ],
)  # fmt: skip
def test_a_setting_that_decides_asks_everything_again(change: dict[str, Any]) -> None:
    one, other = basis_of(Ingest()), basis_of(Ingest(**change))
    assert one.picture != other.picture and one.refusal != other.refusal


@pytest.mark.parametrize(
    "change",
    [
        {"timeout_s": 99}, {"retries": 9}, {"threads": 1}, {"processes": 9}, {"min_yield": 0.1},
        {"max_caption": 9}, {"near_duplicates": 4}, {"samples_per_shard": 7}, {"quality": 50},
        {"max_punsafe": 0.5}, {"blocked": "a"}, {"serve_scenes": False},
    ],
)  # fmt: skip
def test_a_setting_that_does_not_asks_nothing_again(change: dict[str, Any]) -> None:
    assert basis_of(Ingest()) == basis_of(Ingest(**change))


def test_refusals_depend_on_the_code_that_refuses_and_pictures_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = basis_of(Ingest())
    assert before.picture != before.refusal
    monkeypatch.setattr(basis, "REFUSING", REFUSING[1:])
    assert basis_of(Ingest()).picture == before.picture
    assert basis_of(Ingest()).refusal != before.refusal
    monkeypatch.setattr(basis, "MAKING", MAKING[1:])
    assert basis_of(Ingest()).picture != before.picture


@pytest.mark.parametrize("modules", [MAKING, (*MAKING, *REFUSING)])
def test_the_code_that_decides_is_all_named(modules: tuple[str, ...]) -> None:
    """What these modules import of this room is among them, but for the words of reasons."""
    words = ("ingest/reasons", "ingest/captions", "ingest/ratings")
    for module in modules:
        for name in imports(ROOT / "ldm" / f"{module}.py"):
            parts = name.split(".")
            if parts[:2] == ["ldm", "ingest"] and len(parts) == 3:
                assert "/".join(parts[1:]) in {*modules, *words}, name
