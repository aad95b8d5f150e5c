"""The rows of all lists on disk: what is asked of them, and what becomes of them."""

from __future__ import annotations

import sqlite3
from array import array
from collections.abc import Iterator

import pytest

from ldm.config import Ingest
from ldm.errors import UserError
from ldm.ingest import listed as module
from ldm.ingest.listed import Chosen, Listed
from ldm.ingest.reasons import RefusedError
from ldm.ingest.rows import Row, Skip, key_of
from ldm.ingest.scratch import scratch_database, told


def rows_of(split: str, *urls: str) -> list[Row]:
    return [Row(split, at, url, f"caption {at}") for at, url in enumerate(urls)]


def listed_of(*lists: list[Row]) -> Listed:
    listed = Listed()
    for rows in lists:
        listed.take(rows, Ingest())
    return listed


def numbers(rows: Iterator[Row]) -> list[tuple[str, int]]:
    return [(row.split, row.number) for row in rows]


def test_rows_come_back_as_they_were_and_know_their_keys() -> None:
    row = Row("train", 7, "http://a/图", "一 \u00e9", {"license": "cc-by"}, "ab" * 32)
    (found,) = listed_of([row]).wanted()
    assert found == row
    assert vars(found)["key"] == key_of("http://a/图")


def test_the_first_row_of_a_url_that_has_a_caption_stays() -> None:
    rows = [Row("train", at, "http://a/b", words) for at, words in enumerate(["", "x", "y"])]
    listed = listed_of(rows)
    assert numbers(listed.wanted()) == [("train", 1)]
    assert list(listed.left_out()) == [
        Skip(rows[0], "empty caption"),
        Skip(rows[2], "duplicate", "same url as row 1"),
    ]


def test_a_url_in_two_lists_is_asked_once_and_wanted_in_both() -> None:
    listed = listed_of(
        rows_of("train", "http://a/1", "http://a/ü"),
        rows_of("validation", "http://a/%C3%BC", "http://a/1", "ftp://a/1"),
    )
    both = [("train", 0), ("train", 1), ("validation", 0), ("validation", 1)]
    assert numbers(listed.wanted()) == both
    assert numbers(listed.wanted("validation")) == both[2:]
    assert numbers(row for _, row in listed.worth_asking("key")) == both[:2]
    assert numbers(row for _, row in listed.worth_asking("url")) == both[:3]


def test_rows_with_a_url_that_are_not_asked_for_are_at_rest() -> None:
    rows = rows_of("train", "http://a/1", "ftp://a/1", "http://a/2")
    listed = listed_of([Row("train", 9, "http://a/3", ""), *rows])
    assert numbers(listed.resting()) == [("train", 9)]
    assert numbers(row for _, row in listed.worth_asking("key")) == [("train", 0), ("train", 2)]


def test_what_was_asked_for_is_known_when_it_is_left_out() -> None:
    listed = listed_of(rows_of("train", "http://a/1", "http://a/2"))
    first = next(listed.wanted())
    listed.leave_out(first, RefusedError("http 404", "gone"))
    assert numbers(listed.wanted()) == [("train", 1)]
    assert list(listed.left_out()) == [Skip(first, "http 404", "gone")]
    assert numbers(row for _, row in listed.worth_asking("key")) == [("train", 0), ("train", 1)]


@pytest.mark.parametrize("rows", [2, 3, 4, 5])
def test_rows_may_be_left_out_while_they_are_read(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(module, "PAGE", 2)
    listed = listed_of(rows_of("train", *(f"http://a/{at}" for at in range(rows))))
    seen = []
    for row in listed.wanted():
        seen.append(row.number)
        if row.number % 2:
            listed.leave_out(row, RefusedError("http 404"))
    assert seen == list(range(rows))
    assert [row.number for row in listed.wanted()] == list(range(0, rows, 2))


def test_reasons_are_counted_by_list_and_have_an_example() -> None:
    bad = [*rows_of("validation", "ftp://a", "http://a/1", "ftp://b")]
    listed = listed_of(rows_of("train", "http://a/1"), bad)
    assert listed.reasons() == {"train": {"": 1}, "validation": {"": 1, "bad url": 2}}
    assert list(listed.reasons()) == ["train", "validation"]
    assert listed.example("validation", "bad url").row == bad[0]


def test_chosen_rows_are_a_sequence() -> None:
    listed = listed_of(rows_of("train", *(f"http://a/{at}" for at in range(5))))
    places = [place for place, row in listed.worth_asking("key") if row.number % 2 == 0]
    chosen = Chosen(listed, array("q", places))
    assert len(chosen) == 3
    assert [row.number for row in chosen] == [0, 2, 4]
    assert chosen[2].key == key_of("http://a/4")


def test_a_mistake_in_a_statement_is_no_fault_of_the_disk() -> None:
    database = scratch_database("CREATE TABLE filled (words TEXT PRIMARY KEY);")
    with pytest.raises(sqlite3.IntegrityError), told():
        database.executemany("INSERT INTO filled VALUES (?)", [["once"], ["once"]])


def test_a_full_disk_is_told() -> None:
    database = scratch_database("PRAGMA max_page_count = 10; CREATE TABLE filled (words TEXT);")
    words = [["word" * 1000]] * 100
    with pytest.raises(UserError, match=r"full\); make room on that disk, or"), told():
        database.executemany("INSERT INTO filled VALUES (?)", words)
