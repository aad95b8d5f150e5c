"""The data card: its charts, its tables, and the card of pictures that a real server served."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from ldm.artifacts import opening
from ldm.config import Ingest
from ldm.grid import CELL, GAP, TEXT, captioned_grid, wrap
from ldm.ingest.card import card
from ldm.ingest.histogram import BAR, Histogram, chart, histogram
from ldm.ingest.markdown import plain, table
from ldm.ingest.report import report
from ldm.ingest.results import Fetched
from ldm.ingest.rows import Row, Skip
from ldm.ingest.stage import ingest
from tests.served import photograph, serving, stored, write_list

# --- histograms


@settings(max_examples=200)
@given(
    st.one_of(
        st.lists(st.integers(0, 10**7), min_size=1),
        st.lists(st.floats(0, 1), min_size=1),
        st.lists(st.floats(-1e4, 1e4), min_size=1),
        st.lists(st.floats(5, 5 + 1e-12), min_size=1),
    )
)
def test_every_value_is_counted_between_round_edges(values: list[float]) -> None:
    found = histogram(values)
    assert sum(found.counts) == len(values)
    assert found.edges[0] <= min(values)
    assert len(found.counts) <= 16
    assert len(found.edges) == len(found.counts) + (not found.open_end)
    assert list(found.edges) == sorted(set(found.edges))
    if all(isinstance(value, int) for value in values):
        assert all(edge == int(edge) for edge in found.edges)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([64], Histogram([64, 65], [1], False)),
        ([1, 2, 2, 3], Histogram([1, 2, 3], [1, 3], False)),
        ([0.0, 0.05, 0.1, 0.95, 1.0], Histogram([n / 10 for n in range(11)],
                                                [2, 1, 0, 0, 0, 0, 0, 0, 0, 2], False)),
        ([*range(300), 10**6], Histogram([*range(0, 301, 50)], [50] * 6 + [1], True)),
    ],
)  # fmt: skip
def test_histogram(values: list[float], expected: Histogram) -> None:
    assert histogram(values) == expected


def test_bars_are_as_tall_as_their_counts() -> None:
    image = chart("title", Histogram([0, 1, 2], [10, 0, 40], True))
    blue = (np.asarray(image) == ImageColor.getrgb(BAR)).all(axis=2)
    tall = blue.sum(axis=0)
    bars = [part for part in np.split(tall, np.flatnonzero(tall == 0)) if part.sum()]
    assert len(bars) == 2
    assert abs(4 * bars[0].max() - bars[1].max()) <= 4
    assert image.tobytes() == chart("title", Histogram([0, 1, 2], [10, 0, 40], True)).tobytes()


# --- markdown


def test_words_of_others_stay_words() -> None:
    hostile = "a ![b](http://c/d.png) <img src=e> | `f` **g** &lt; <!--\nh"
    assert plain(hostile) == (
        r"a \!\[b\](http\://c/d.png) \<img src=e\> \| \`f\` \*\*g\*\* \&lt; \<\!-- h"
    )
    assert (
        plain("un cercle à gauche, 一个红色圆形 (2.5)") == "un cercle à gauche, 一个红色圆形 (2.5)"
    )


def test_table() -> None:
    expected = "| a | b | c |\n| --- | ---: | ---: |\n| x | 1,234 | 0.50 |\n| y | 0 | 1.25 |"
    assert table(("a", "b", "c"), [("x", 1234, 0.5), ("y", 0, 1.25)]) == expected


# --- the sheet


def test_pictures_on_the_sheet_keep_their_shape() -> None:
    red = np.full((32, 64, 3), (255, 0, 0), np.uint8)
    for picture, size in ((red, (80, 160)), (red.swapaxes(0, 1), (160, 80))):
        sheet = captioned_grid([picture], [""], 1)
        places = np.argwhere((sheet == (255, 0, 0)).all(axis=2))
        first, last = places.min(axis=0), places.max(axis=0)
        assert tuple(last - first + 1) == size and len(places) == 80 * 160
        assert (np.abs(first + last + 1 - (2 * GAP + CELL)) <= 1).all()


def test_a_caption_stays_in_its_place() -> None:
    """Under its own picture, whatever its length; words that are too long are broken."""
    blank = np.full((64, 64, 3), 255, np.uint8)
    for caption in ("word " * 100, "w" * 500, "w" * 30 + " and more"):
        sheet = captioned_grid([blank] * 4, [caption, "", "", ""], 2)
        inked = np.argwhere((sheet < 255).any(axis=2))
        (top, left), (bottom, right) = inked.min(axis=0), inked.max(axis=0)
        assert left >= GAP and right < GAP + CELL
        assert top >= GAP + CELL and bottom < GAP + CELL + TEXT
    assert wrap("word " * 100, CELL).endswith("…") and not wrap("a word", CELL).endswith("…")


# --- the card


def kept(count: int, host: str = "a.org") -> list[tuple[Row, Fetched]]:
    """Rows with the same picture."""
    content = stored(photograph(0, 64))
    fetched = Fetched("", 640, 480, lambda: content)
    return [
        (Row("train", at, f"http://{host}/{at}", f"caption {at}"), fetched) for at in range(count)
    ]


def text_of(rows: list[tuple[Row, Fetched]], skipped: list[Skip] | None = None) -> str:
    skipped = skipped or []
    counts = report({"train": Counter({"": len(rows)}) + Counter(s.reason for s in skipped)})
    left_out = [skip.row for skip in skipped]
    return card(counts, rows, left_out, [(64, 64)])["card.md"].decode()


def test_one_sample_is_enough() -> None:
    text = text_of(kept(1))
    assert "1 of 1, drawn by lot" in text
    assert "## Left out\n\nNothing." in text
    assert "Licences" not in text


def test_the_lot_is_not_the_head_of_the_list() -> None:
    rows = kept(1000)
    lines = text_of(rows).splitlines()
    drawn = [int(line.split()[2]) for line in lines if line.startswith("| train ")]
    assert len(set(drawn)) == 24
    assert drawn == sorted(drawn)
    assert 300 < np.mean(drawn) < 700


def test_reasons_are_counted_together() -> None:
    reasons = ["duplicate", "duplicate content", "near duplicate", "not allowed by its site"]
    reasons += ["blocked"] * 2 + ["http 404"] * 6
    row = Row("train", 9, "http://a/b", "words")
    lines = text_of(kept(2), [Skip(row, reason) for reason in reasons]).splitlines()
    counts = {"rows": 14, "kept": 2, "duplicates": 3, "opt-outs": 1, "blocked": 2}
    for name, count in [*counts.items(), ("left out otherwise", 6)]:
        assert f"| {name} | {count} | {count} |" in lines


def test_domains_with_most_rows_come_first() -> None:
    rows = [row for host in "abcdefghijkl" for row in kept(2, f"{host}.org")]
    skipped = [Skip(Row("train", at, "http://l.org/x", ""), "empty caption") for at in range(3)]
    skipped.append(Skip(Row("train", 9, "ftp://b", "words"), "bad url"))
    lines = text_of(rows, skipped).partition("## Domains")[2].splitlines()
    assert lines[4:6] == ["| l.org | 5 | 2 |", "| a.org | 2 | 2 |"]
    assert lines[-1] == "| 3 others | 5 | 4 |"


def test_the_card_of_a_list(tmp_path: Path) -> None:
    files = {
        "one.jpg": stored(photograph(0).resize((400, 100)), "JPEG"),
        "two.png": stored(photograph(1)),
        "copy.png": stored(photograph(1), compress_level=1),
        "private.png": stored(photograph(2)),
        "rude.png": stored(photograph(3)),
        "other.png": stored(photograph(4, 64)),
    }
    with serving(files, denied={"private.png"}) as server:
        rows = [
            (f"{server}/one.jpg", "a caption", "cc-by", "0.1"),
            (f"{server}/two.png", "另一个 | caption", "cc-by|nc", "0.2"),
            (f"{server}/copy.png", "words", "", "0"),
            (f"{server}/private.png", "words", "", "0"),
            (f"{server}/rude.png", "words", "", "0.9"),
        ]
        write_list(tmp_path / "data" / "train.csv", "url,caption,license,punsafe", rows)
        other = [(f"{server}/other.png", "words", "0.3")]
        write_list(tmp_path / "data" / "validation.csv", "url,caption,punsafe", other)
        config = Ingest(
            image_size=128, threads=4, processes=1, max_punsafe=0.5, min_yield=0.1, retries=0
        )
        ingest(config, tmp_path / "data", tmp_path / "images", tmp_path / "runs")
    text = (tmp_path / "images" / "card.md").read_text()
    for line in (
        "| rows | 5 | 1 | 6 |",
        "| kept | 2 | 1 | 3 |",
        "| duplicates | 1 | 0 | 1 |",
        "| opt-outs | 1 | 0 | 1 |",
        "| left out otherwise | 1 | 0 | 1 |",
        "| punsafe too high | 1 | 16.67% |",
        "| shorter side before the crop, in pixels | 3 | 64 | 100 | 256 |",
        "| longer over shorter side | 3 | 1.00 | 1.00 | 4.00 |",
        "| caption, in characters | 3 | 5 | 9 | 13 |",
        "| punsafe | 3 | 0.10 | 0.20 | 0.30 |",
        "Smaller than the crop of 128 pixels, and blown up to it: 2.",
        r"| train 1 | 另一个 \| caption |",
        r"| cc-by\|nc | 1 |",
        "| none given | 1 |",
        "| 127.0.0.1 | 6 | 3 |",
    ):
        assert line in text.splitlines()
    manifest = opening(tmp_path / "images", "images", "ingest")
    pictures = {name for name in manifest.files if name.endswith(".png")}
    parts = ("samples", "sides", "aspects", "captions", "punsafe")
    assert pictures == {f"card-{part}.png" for part in parts}
    assert all(f"({name})" in text for name in pictures)
    sheet = Image.open(tmp_path / "images" / "card-samples.png").convert("RGB")
    first = photograph(4, 64).resize((128, 128)).resize((160, 160))
    shown = np.asarray(sheet, int)[10:170, 350:510]
    assert np.abs(shown - np.asarray(first, int)).mean() < 6
