"""What first-stage training adds to the plain recipes."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPModel, CLIPTokenizer

from ldm.config import ClipTraining, LayoutTraining, VaeTraining
from ldm.first_stage.layout import errors, latents_of, layout_accuracy, train_layout
from ldm.first_stage.loop import Run
from ldm.first_stage.rearranged import Rearranger
from ldm.first_stage.stage import text_encoder_of
from ldm.first_stage.tokenizer import train_tokenizer
from ldm.first_stage.vae import build_vae
from ldm.images import to_model
from ldm.models import tiny_folder
from ldm.scenes.captions import caption
from ldm.scenes.lists import caption_of
from ldm.scenes.world import KNOWN_SHAPES, describe
from ldm.text import lengths, tokenize

START, END = 100, 101
CPU = torch.device("cpu")


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


@settings(max_examples=60)
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


def test_the_text_encoder_learns_what_stands_where(
    tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    clip = CLIPModel.from_pretrained(tiny_folder() / "clip", dtype=torch.float32)
    text_encoder = text_encoder_of(clip)
    red, blue = torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.tensor([-1.0, 1.0, 1.0, -1.0])
    captions, latents = [], torch.zeros(8, 4, 8, 8)
    for number in range(8):
        (first, left), (second, right) = [("red", red), ("blue", blue)][:: (-1) ** number]
        captions.append(f"a {first} circle left of a {second} circle on a white background")
        latents[number, :, :, :4], latents[number, :, :, 4:] = (
            left[:, None, None],
            right[:, None, None],
        )
    config = LayoutTraining(steps=150, warmup_steps=20, batch_size=8)
    run = Run(tmp_path, checkpoint_every=1000, log_every=50)
    reader = train_layout(config, text_encoder, tokenizer, latents, captions, CPU, run)
    tokens = tokenize(tokenizer, captions)
    assert errors(text_encoder, reader, tokens, latents, CPU).max() < 0.1
    accuracy = layout_accuracy(text_encoder, reader, tokenizer, latents, captions, CPU)
    assert accuracy == 1.0
    assert not any(parameter.requires_grad for parameter in text_encoder.parameters())


def test_padding_behind_the_end_is_left_out(tokenizer: CLIPTokenizer) -> None:
    captions = ["a red circle on a white background", "two blue stars"]
    tokens = tokenize(tokenizer, captions)
    wanted = [2 + len(tokenizer(one, add_special_tokens=False)["input_ids"]) for one in captions]
    assert lengths(tokens).tolist() == wanted


def test_the_same_captions_make_the_same_tokenizer() -> None:
    """Few captions: many pairs of symbols are as frequent as each other."""
    captions = [caption_of("retrain", "train", row) for row in range(48)]
    made = [train_tokenizer(ClipTraining(), captions).backend_tokenizer for _ in range(12)]
    assert len({one.to_str() for one in made}) == 1


def test_latents_are_scaled_once() -> None:
    vae = build_vae(VaeTraining(widths=(8, 8, 8, 8), norm_groups=4), 64).eval()
    vae.register_to_config(scaling_factor=0.5)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)
    found = latents_of(vae, lambda numbers: pixels[numbers], 70)
    with torch.no_grad():
        mean = vae.encode(to_model(pixels)).latent_dist.mean
    torch.testing.assert_close(found, 0.5 * mean)


def test_the_text_encoder_starts_as_clips_tower(tokenizer: CLIPTokenizer) -> None:
    clip = CLIPModel.from_pretrained(tiny_folder() / "clip", dtype=torch.float32)
    ids = tokenize(tokenizer, ["two blue stars"])
    states = text_encoder_of(clip)(ids).last_hidden_state
    torch.testing.assert_close(states, clip.text_model(input_ids=ids).last_hidden_state)
