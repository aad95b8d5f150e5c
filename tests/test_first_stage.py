"""What first-stage training adds to the plain recipes."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from ldm.first_stage.rearranged import Rearranger
from ldm.models import tiny_folder
from ldm.scenes.captions import caption
from ldm.scenes.world import KNOWN_SHAPES, describe
from ldm.text import tokenize

START, END = 100, 101


def padded(*ids: int, length: int = 8) -> torch.Tensor:
    return torch.tensor([START, *ids] + [END] * (length - 1 - len(ids)))


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tiny_folder() / "tokenizer")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a red circle left of a blue square on a grey background",
            {
                "a blue circle left of a red square on a grey background",
                "a red square left of a blue circle on a grey background",
                "a blue square left of a red circle on a grey background",
            },
        ),
        ("two red circles on a grey background", set()),
        ("a small red circle, white background", set()),
        (
            "黑色背景，一个红色圆形在一个蓝色方形的左边",
            {
                "黑色背景，一个蓝色圆形在一个红色方形的左边",
                "黑色背景，一个红色方形在一个蓝色圆形的左边",
                "黑色背景，一个蓝色方形在一个红色圆形的左边",
            },
        ),
    ],
)
def test_captions_of_the_same_words_that_say_something_else(
    tokenizer: CLIPTokenizer, text: str, expected: set[str]
) -> None:
    rng = random.Random(0)
    corpus = [caption(describe(rng, KNOWN_SHAPES), rng) for _ in range(3000)]
    rearranged = Rearranger(tokenize(tokenizer, corpus))
    found = rearranged.all_of(tokenize(tokenizer, [text])[0])
    wanted = [tokenize(tokenizer, [one])[0].tolist() for one in expected]
    assert found.tolist() == sorted(wanted)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=12))
def test_rearrangements_are_permutations_that_read_like_the_corpus(corpus: list[list[int]]) -> None:
    captions = torch.stack([padded(*ids) for ids in corpus])
    pairs = {pair for ids in captions.tolist() for pair in pairwise(ids)}
    rearranged = Rearranger(captions)
    for ids in captions:
        for found in rearranged.all_of(ids).tolist():
            assert found != ids.tolist()
            assert sorted(found) == sorted(ids.tolist())
            assert set(pairwise(found)) <= pairs


def test_some_of_each_leaves_out_captions_without_any() -> None:
    captions = torch.stack([padded(1, 2, 3), padded(3, 2, 1), padded(4, 4)])
    rearranged = Rearranger(captions)
    assert rearranged.all_of(captions[2]).shape == (0, 8)
    drawn = rearranged.some_of_each(captions, 3, np.random.default_rng(0))
    assert drawn.tolist() == [captions[1].tolist(), captions[0].tolist()]
    assert rearranged.some_of_each(captions[2:], 3, np.random.default_rng(0)).shape == (0, 8)
