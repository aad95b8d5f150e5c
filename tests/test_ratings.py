"""Licences and scores in a list: what they must be, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldm.config import Ingest
from ldm.errors import UserError
from ldm.ingest.blocklist import Blocklist
from ldm.ingest.listed import Listed
from ldm.ingest.repack import Sieve
from ldm.ingest.results import Fetched
from ldm.ingest.rows import Row, Skip, read_list
from ldm.ingest.stage import ingest
from tests.served import photograph, stored, write_list

COLUMNS = "url,caption,license,punsafe,pwatermark,aesthetic,note"


def sorted_out(
    folder: Path, *cells: tuple[str, ...], **limits: Any
) -> tuple[list[Row], list[Skip]]:
    """Rows of license, punsafe, pwatermark, aesthetic; each its own URL."""
    rows = [(f"http://a/{at}", "words", *row, "left alone") for at, row in enumerate(cells)]
    write_list(folder / "list.csv", COLUMNS, rows)
    return taken(folder, **limits)


def taken(folder: Path, **limits: Any) -> tuple[list[Row], list[Skip]]:
    """What becomes of a list's rows before any is asked for."""
    listed = Listed()
    listed.take(read_list(folder / "list.csv", "train", 100), Ingest(**limits))
    return list(listed.wanted()), list(listed.left_out())


@pytest.mark.parametrize(
    ("cells", "limits", "reason", "detail"),
    [
        (("", "0.6", "", ""), {"max_punsafe": 0.5}, "punsafe too high", "0.6, at most 0.5"),
        (("", "0.5", "", ""), {"max_punsafe": 0.5}, None, ""),
        (("", "0.6", "", ""), {"max_pwatermark": 0.5}, "no score", "pwatermark is empty"),
        (("", "0", "0.6", ""), {"max_pwatermark": 0.5}, "pwatermark too high", "0.6, at most"),
        (("", "", "5e-1", ""), {"max_pwatermark": 0.5}, None, ""),
        (("", "", "", "4.9"), {"min_aesthetic": 5}, "aesthetic too low", "4.9, at least 5"),
        (("", "", "", "5"), {"min_aesthetic": 5}, None, ""),
        (("", "", "", ""), {"min_aesthetic": 5}, "no score", "aesthetic is empty"),
        (("", "", "", ""), {"max_punsafe": 1}, "no score", "punsafe is empty"),
        (("CC-by", "", "", ""), {"licenses": ["cc0", "cc-BY"]}, None, ""),
        (("cc-by-nc", "", "", ""), {"licenses": ["cc-by"]}, "license not allowed", "cc-by-nc"),
        (("", "", "", ""), {"licenses": ["cc-by"]}, "license not allowed", "none is given"),
        (("", "high", "", ""), {}, "bad score", "punsafe is 'high', not a number"),
        (("", "", "nan", ""), {"max_pwatermark": 0.5}, "bad score", "pwatermark is 'nan'"),
        (("", "", "", "-inf"), {}, "bad score", "aesthetic is '-inf'"),
        (("", "1.01", "", ""), {}, "bad score", "punsafe is '1.01', not a number from 0 to 1"),
        (("", "", "-1", ""), {}, "bad score", "pwatermark is '-1', not"),
        (("any", "1", "1", "-3"), {}, None, ""),
        (("", "", "", ""), {}, None, ""),
    ],
)  # fmt: skip
def test_rows_outside_the_limits_are_skipped(
    tmp_path: Path, cells: tuple[str, ...], limits: dict[str, Any], reason: str | None, detail: str
) -> None:
    wanted, skipped = sorted_out(tmp_path, cells, **limits)
    assert len(wanted) == (reason is None)
    assert [skip.reason for skip in skipped] == ([reason] if reason else [])
    assert all(skip.detail.startswith(detail) for skip in skipped)


def test_the_first_good_row_of_a_url_stays(tmp_path: Path) -> None:
    rows = [("http://a/b", "words", "", score, "", "", "") for score in ("0.9", "0.1", "0.2")]
    write_list(tmp_path / "list.csv", COLUMNS, rows)
    wanted, skipped = taken(tmp_path, max_punsafe=0.5)
    assert [row.number for row in wanted] == [1]
    assert [skip.reason for skip in skipped] == ["punsafe too high", "duplicate"]


def test_a_sample_carries_what_its_row_gives(tmp_path: Path) -> None:
    content = stored(photograph(0, 64))
    fetched = Fetched("", 64, 64, lambda: content)
    cells = [(" cc-by \n", "0.25", "", "6"), ("", "", "", "")]
    for row, expected in zip(
        sorted_out(tmp_path, *cells)[0],
        [{"license": "cc-by", "punsafe": 0.25, "aesthetic": 6.0}, {}],
        strict=True,
    ):
        about = json.loads(Sieve(Ingest(), Blocklist()).sample(row, fetched, (64, 64))()["json"])
        assert {name: about[name] for name in list(about)[5:]} == expected


def test_a_limit_without_its_column_fails_before_any_download(tmp_path: Path) -> None:
    write_list(tmp_path / "train.csv", "url,caption,punsafe", [("http://a/b", "words", "0")])
    write_list(tmp_path / "validation.csv", "url,caption", [("http://a/b", "words")])
    words = (
        r"validation\.csv: 0 of 1 rows kept.*mostly no score \(1 rows, such as row 0: punsafe is "
        r"empty\); fill that column"
    )
    with pytest.raises(UserError, match=words):
        ingest(Ingest(max_punsafe=0.5), tmp_path, tmp_path / "out", tmp_path / "runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.csv", "validation.csv"]
