"""The embedded world: its lists, captions, layouts and drawings, and the reader that judges."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ldm.errors import UserError
from ldm.scenes import lists, reader
from ldm.scenes.captions import CHINESE, PLURALS, RELATION_WORDINGS, caption, plain_caption
from ldm.scenes.lists import caption_of
from ldm.scenes.outlines import OUTLINES
from ldm.scenes.reader import Reading, Seen, mismatch, read_scene, shows
from ldm.scenes.render import SAMPLES, coverage, draw
from ldm.scenes.world import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    FORMS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    MIRRORED,
    NEW_SHAPES,
    RELATIONS,
    SHAPES,
    SIZES,
    Description,
    Kind,
    Scene,
    Thing,
    describe,
    lay_out,
)

ROWS = 2000
PROMPTS = 80
PINNED = {
    "train.csv": "d4e6b420ba9fbb2318b58f82f95d3db2acae3e2d66e02404c5d8919ef17db4bc",
    "validation.csv": "82f726b3fae0954aa307d9c1434694e25a42c5608984c80b19597b8c43daed89",
    "prompts.jsonl": "a4c8d72cd2042509234b72576c5f4901ec7af168bd58fb98aa171cdd9c66fc7f",
}
OPPOSITE = {**MIRRORED, **{value: key for key, value in MIRRORED.items()}}

quick = settings(max_examples=80)
seeds = st.integers(0, 2**32 - 1)
kinds = st.builds(Kind, st.sampled_from(SHAPES), st.sampled_from(sorted(COLOURS)))
backgrounds = st.sampled_from(sorted(BACKGROUNDS))
descriptions = st.one_of(
    st.builds(Description, backgrounds, kinds, size=st.sampled_from((None, *SIZES))),
    st.builds(Description, backgrounds, kinds, count=st.sampled_from((2, 3))),
    st.builds(
        Description, backgrounds, kinds, relation=st.sampled_from(RELATIONS), second=kinds
    ).filter(lambda found: found.first != found.second),
)


# --- lists


def test_lists_are_the_same_bytes_twice_and_as_pinned(tmp_path: Path) -> None:
    for folder in ("once", "again"):
        lists.write_lists(tmp_path / folder, "retrain", 60, 12, prompts_a_group=PROMPTS)
    once, again = (_digests(tmp_path / folder) for folder in ("once", "again"))
    assert once == again
    assert once == PINNED


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("train.csv", "url,caption\nhttps://example.org/a.jpg,a cat\n"),
        ("prompts.jsonl", '{"prompt": "a cat"}\n'),
    ],
)
def test_lists_of_ones_own_are_not_replaced(tmp_path: Path, name: str, own: str) -> None:
    lists.write_lists(tmp_path, "retrain", 20, 10, prompts_a_group=2)
    before = _digests(tmp_path)
    file = tmp_path / name
    file.write_text(file.read_text() + own.removeprefix("url,caption\n"))
    with pytest.raises(UserError, match=rf"{name}: was not written by `ldm scenes`"):
        lists.write_lists(tmp_path, "retrain", 30, 10, prompts_a_group=2)
    file.write_text(own)
    with pytest.raises(UserError, match="move it away, or name another folder with --out"):
        lists.write_lists(tmp_path, "retrain", 30, 10, prompts_a_group=2)
    assert _digests(tmp_path).items() - before.items() == {(name, _digests(tmp_path)[name])}


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("world", lists.WORLDS)
def test_held_out_compositions_are_not_in_training(world: str) -> None:
    for row in range(ROWS):
        description, _ = lists.scene_of(world, "train", row)
        assert not description.held_out
        assert not _words_held_out(lists.caption_of(world, "train", row))


@pytest.mark.parametrize("chinese", [False, True])
def test_held_out_wording_is_recognised(chinese: bool) -> None:
    """Guards the test above: its reading of captions agrees with the descriptions."""
    rng = random.Random(1)
    for _ in range(ROWS):
        description = describe(rng, SHAPES)
        assert _words_held_out(caption(description, rng, chinese)) == description.held_out


def _words_held_out(words: str) -> bool:
    """Whether a caption names a held-out composition, judged from its words alone."""
    for shape, colour in HELD_OUT_PAIRS:
        pattern = rf"{colour} {shape}|{CHINESE[colour]}[小大]?{CHINESE[shape]}"
        if re.search(pattern, words):
            return True
    for a, relation, b in HELD_OUT_RELATIONS:
        for first, place, second in ((a, relation, b), (b, OPPOSITE[relation], a)):
            english = rf"{first} ({'|'.join(RELATION_WORDINGS[place])}) an? \w+ {second}"
            chinese = rf"{CHINESE[first]}在一个\w\w{CHINESE[second]}的{CHINESE[place]}"
            if re.search(f"{english}|{chinese}", words):
                return True
    return False


def test_prompts_are_distinct_and_of_their_group() -> None:
    prompts = lists.prompts(PROMPTS)
    sizes = Counter(prompt["group"] for prompt in prompts)
    assert sizes == dict.fromkeys(("known", "new", "heldout"), PROMPTS)
    assert len({prompt["prompt"] for prompt in prompts}) == len(prompts)
    assert len({prompt["english"] for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        scene = lists.read_description(json.loads(json.dumps(prompt["scene"])))
        assert prompt["english"] == plain_caption(scene)
        assert _words_held_out(prompt["prompt"]) == (prompt["group"] == "heldout")
        if prompt["group"] != "heldout":
            assert scene.has_new_shape == (prompt["group"] == "new")
    assert sum(not prompt["prompt"].isascii() for prompt in prompts) == len(prompts) // 4


def test_prompt_groups_have_the_same_mix_of_forms() -> None:
    found = Counter(
        (prompt["group"], lists.read_description(prompt["scene"]).form)
        for prompt in lists.prompts(PROMPTS)
    )
    for group, form in product(("known", "new", "heldout"), FORMS):
        assert found[group, form] == pytest.approx(FORMS[form] * PROMPTS, abs=1)


@pytest.mark.parametrize("world", lists.WORLDS)
def test_how_much_of_a_world_is_unknown(world: str) -> None:
    drawn = [lists.scene_of(world, "train", row)[0] for row in range(1000)]
    share = lists.WORLDS[world].share
    # Five standard errors.
    spread = (share * (1 - share) / 1000) ** 0.5
    assert sum(not one.is_known for one in drawn) / 1000 == pytest.approx(share, abs=5 * spread)
    assert world == "retrain" or not any(one.has_new_shape for one in drawn)


@quick
@given(descriptions)
def test_descriptions_survive_json(description: Description) -> None:
    assert lists.read_description(json.loads(json.dumps(asdict(description)))) == description


# --- captions


@quick
@given(descriptions, seeds)
def test_english_names_every_attribute(description: Description, seed: int) -> None:
    words = caption(description, random.Random(seed), chinese=False)
    assert words.isascii()
    assert f"{description.background} background" in words
    if description.count > 1:
        first = description.first
        plural = PLURALS.get(first.shape, first.shape + "s")
        number = {2: "two", 3: "three"}[description.count]
        assert f"{number} {first.colour} {plural}" in words
    else:
        names = [f"{kind.colour} {kind.shape}" for kind in description.kinds]
        assert re.search(".*".join(names), words)
    for size in SIZES:
        assert (f"{size} " in words) == (size == description.size)
    for relation, wordings in RELATION_WORDINGS.items():
        named = any(f" {wording} a" in words for wording in wordings)
        assert named == (relation == description.relation)


@quick
@given(descriptions, seeds)
def test_chinese_names_every_attribute(description: Description, seed: int) -> None:
    words = caption(description, random.Random(seed), chinese=True)
    assert not re.search("[a-zA-Z]", words)
    assert f"{CHINESE[description.background]}背景" in words
    size = CHINESE[description.size] if description.size else ""
    names = [CHINESE[kind.colour] + size + CHINESE[kind.shape] for kind in description.kinds]
    number = {1: "一个", 2: "两个", 3: "三个"}[description.count]
    named = f"{number}{names[0]}"
    if description.second is not None:
        named += f"在一个{names[1]}的{CHINESE[description.relation or '']}"
    assert named in words


def test_captions_tell_descriptions_apart() -> None:
    rng = random.Random(2)
    drawn = {describe(rng, SHAPES) for _ in range(ROWS)}
    assert len({plain_caption(one) for one in drawn}) == len(drawn)
    assert len({caption(one, random.Random(0), chinese=True) for one in drawn}) == len(drawn)


# --- layouts


@quick
@given(descriptions, seeds)
def test_layouts_show_what_is_described(description: Description, seed: int) -> None:
    scene = lay_out(description, random.Random(seed))
    wanted = Counter({description.first: description.count})
    wanted.update(description.kinds[1:])
    assert scene.background == description.background
    assert Counter(thing.kind for thing in scene.things) == wanted
    if description.size:
        low, high = SIZES[description.size]
        assert low <= scene.things[0].radius <= high
    if description.second is not None:
        first = next(thing for thing in scene.things if thing.kind == description.first)
        second = next(thing for thing in scene.things if thing.kind == description.second)
        right, down = first.x - second.x, first.y - second.y
        along = {"left of": -right, "right of": right, "above": -down, "below": down}
        assert along[description.relation or ""] > 2 * min(abs(right), abs(down))


@quick
@given(descriptions, seeds)
def test_objects_are_whole_and_apart(description: Description, seed: int) -> None:
    scene = lay_out(description, random.Random(seed))
    for thing in scene.things:
        assert thing.radius + 1 <= min(thing.x, thing.y)
        assert max(thing.x, thing.y) <= CANVAS - thing.radius - 1
    together = sum(coverage(thing) for thing in scene.things)
    _, found = ndimage.label(together > 0, np.ones((3, 3)))
    assert found == len(scene.things)


# --- drawings


@quick
@given(descriptions, seeds)
def test_drawings_are_anti_aliased_blends(description: Description, seed: int) -> None:
    scene = lay_out(description, random.Random(seed))
    pixels = draw(scene)
    assert pixels.shape == (CANVAS, CANVAS, 3)
    assert pixels.dtype == np.uint8
    background = np.array(BACKGROUNDS[scene.background], dtype=float)
    off = np.full((CANVAS, CANVAS), np.inf)
    for kind in description.kinds:
        ink = np.array(COLOURS[kind.colour]) - background
        share = np.clip((pixels - background) @ ink / (ink @ ink), 0, 1)
        blend = background + share[..., None] * ink
        off = np.minimum(off, np.abs(pixels - blend).max(axis=-1))
    assert off.max() <= 1
    shares = np.concatenate([coverage(thing).ravel() for thing in scene.things])
    assert np.allclose(shares * SAMPLES**2, np.rint(shares * SAMPLES**2))
    assert len(np.unique(shares)) > 3
    assert {0.0, 1.0} <= set(shares)


# --- the reader


@cache
def _drawn() -> tuple[tuple[Description, np.ndarray], ...]:
    """Every shape in every colour on every background, in all forms: 256 pictures."""
    pictures = []
    for row, (shape, colour, background) in enumerate(product(SHAPES, COLOURS, BACKGROUNDS)):
        rng = random.Random(f"reader/{row}")
        form = replace(describe(rng, SHAPES), background=background, first=Kind(shape, colour))
        if form.second == form.first:
            form = replace(form, second=None, relation=None)
        pictures.append((form, draw(lay_out(form, rng))))
    return tuple(pictures)


@cache
def _readings() -> tuple[tuple[Description, Reading], ...]:
    return tuple((form, read_scene(pixels)) for form, pixels in _drawn())


def test_pictures_read_as_described() -> None:
    wrong = [(form, fault) for form, reading in _readings() if (fault := mismatch(reading, form))]
    assert len(wrong) <= 0.01 * len(_readings()), wrong


def test_degraded_pictures_read_as_described() -> None:
    """Blur of 0.7 to 1 pixel, noise of 5 and a colour shift of up to 10: 28 to 29 dB."""
    noise = np.random.default_rng(4)
    wrong = []
    pictures = _drawn()[::2]
    for form, pixels in pictures:
        if fault := mismatch(read_scene(_degrade(pixels, noise)), form):
            wrong.append((form, fault))
    assert len(wrong) <= 0.03 * len(pictures), wrong


def _degrade(pixels: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    sigma = noise.uniform(0.7, 1.0)
    blurred = ndimage.gaussian_filter(pixels.astype(float), (sigma, sigma, 0))
    shifted = blurred + noise.uniform(-10, 10, 3) + noise.normal(0, 5, blurred.shape)
    return np.clip(np.rint(shifted), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "attribute", ["background", "colour", "shape", "count", "size", "relation", "swap"]
)
def test_pictures_of_something_else_are_refused(attribute: str) -> None:
    asked = [
        (form, other, reading)
        for form, reading in _readings()
        for other in _changed(form, attribute)
    ]
    fooled = [pair for *pair, reading in asked if mismatch(reading, pair[1]) is None]
    assert len(asked) > 60
    assert len(fooled) <= 0.01 * len(asked), fooled


def _changed(form: Description, attribute: str) -> list[Description]:
    """Every description that differs from ``form`` in one attribute."""
    if attribute == "background":
        return [replace(form, background=name) for name in BACKGROUNDS if name != form.background]
    if attribute == "count" and form.second is None:
        return [replace(form, size=None, count=n) for n in (1, 2, 3) if n != form.count]
    if attribute == "size" and form.size:
        return [replace(form, size=size) for size in SIZES if size != form.size]
    if attribute == "relation" and form.relation:
        return [replace(form, relation=one) for one in RELATIONS if one != form.relation]
    if attribute == "swap" and form.second:
        return [replace(form, first=form.second, second=form.first)]
    if attribute not in ("colour", "shape"):
        return []
    names = COLOURS if attribute == "colour" else SHAPES
    changed = []
    for role in ("first", "second") if form.second else ("first",):
        kind = getattr(form, role)
        others = (replace(kind, **{attribute: name}) for name in names)
        changed += [replace(form, **{role: other}) for other in others if other != kind]
    return changed


RED_CIRCLE = Description("white", Kind("circle", "red"))
MIDDLE = Thing(Kind("circle", "red"), 32, 32, 12)


def _paint(mask: np.ndarray, colour: str, onto: np.ndarray | None = None) -> np.ndarray:
    """A soft mask in a colour, on white or over another picture."""
    below = draw(Scene("white", ())) if onto is None else onto
    blend = below + mask[..., None] * (np.array(COLOURS[colour], dtype=float) - below)
    return np.rint(blend).astype(np.uint8)


def test_small_specks_are_noise_and_larger_ones_are_not() -> None:
    for side, fault in ((3, None), (5, "2 objects, not 1")):
        pixels = draw(Scene("white", (MIDDLE,)))
        pixels[4 : 4 + side, 4 : 4 + side] = COLOURS["blue"]
        assert mismatch(read_scene(pixels), RED_CIRCLE) == fault


def test_malformed_objects_are_refused() -> None:
    rows, columns = np.mgrid[:CANVAS, :CANVAS] + 0.5
    circle, ring = coverage(MIDDLE), coverage(replace(MIDDLE, kind=Kind("ring", "red")))
    heart = coverage(replace(MIDDLE, kind=Kind("heart", "red")))
    bitten = circle * ~((rows > 32) & (columns > 32))
    holed = circle * (np.hypot(rows - 32, columns - 32) > 4)
    gapped = ring * ~((abs(rows - 32) < 1.5) & (columns > 32))
    stretched = coverage(replace(MIDDLE, x=26)) + coverage(replace(MIDDLE, x=38))
    for shape, mask in {
        "circle": (circle * (rows < 35), bitten, holed, np.minimum(stretched, 1)),
        "ring": (gapped, circle),
        "heart": (heart[::-1], heart.T, circle),
    }.items():
        for malformed in mask:
            asked = Description("white", Kind(shape, "red"))
            assert mismatch(read_scene(_paint(malformed, "red")), asked) == f"no red {shape}"


def test_muddled_colours_are_refused() -> None:
    left = np.arange(CANVAS) < 32
    red = draw(Scene("white", (MIDDLE,)))
    two_tone = _paint(coverage(MIDDLE) * left, "orange", red)
    between = _paint(coverage(MIDDLE) * 0.5, "orange", red)
    faint = _paint(coverage(MIDDLE) * 0.4, "blue")
    for pixels in (two_tone, between, faint):
        (seen,) = read_scene(pixels).things
        assert (seen.shape, seen.colour) == ("circle", None)


def test_unclear_backgrounds_are_refused() -> None:
    pixels = draw(Scene("white", (MIDDLE,)))
    tinted = (pixels * (1.0, 0.8, 1.0)).astype(np.uint8)
    assert mismatch(read_scene(tinted), RED_CIRCLE) == "background unclear, not white"
    split = pixels.copy()
    split[:14] = BACKGROUNDS["grey"]
    assert not shows(split, RED_CIRCLE)


def test_merged_objects_are_refused() -> None:
    pair = Description("white", Kind("circle", "red"), count=2)
    things = tuple(Thing(Kind("circle", "red"), x, 32, 10) for x in (23.0, 41.0))
    assert mismatch(read_scene(draw(Scene("white", things))), pair) == "1 object, not 2"


def test_pictures_of_nothing_are_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (CANVAS, CANVAS, 3), dtype=np.uint8)
    stripes = np.zeros_like(noise)
    stripes[::2] = 255
    blank = draw(Scene("white", ()))
    assert read_scene(blank) == Reading("white", ())
    for pixels in (noise, stripes, blank):
        assert not shows(pixels, RED_CIRCLE)


def test_made_up_shapes_are_none_of_the_new_and_hardly_any_a_known_one() -> None:
    passes_for: Counter[str | None] = Counter()
    for name, radius in product(OUTLINES, (9.0, 12.0, 17.0)):
        reading = read_scene(draw(Scene("white", (Thing(Kind(name, "red"), 32, 32, radius),))))
        passes_for.update(thing.shape for thing in reading.things)
    assert not any(passes_for[shape] for shape in NEW_SHAPES)
    assert passes_for[None] > 0.95 * passes_for.total()


def test_made_up_shapes_are_drawn_as_large_as_asked_and_told_apart() -> None:
    covers = [coverage(Thing(Kind(name, "red"), 32.0, 32.0, 16.0)) for name in OUTLINES]
    for cover in covers:
        rows, columns = np.nonzero(cover > 0.5)
        reach = np.hypot(columns + 0.5 - 32, rows + 0.5 - 32).max()
        assert 14 < reach < 16.5
    for one, other in combinations(covers, 2):
        assert np.abs(one - other).sum() > 0.1 * one.sum()


def test_the_scratch_list_names_made_up_shapes_in_both_languages() -> None:
    captions = [caption_of("scratch", "train", row) for row in range(600)]
    for names in (OUTLINES, OUTLINES.values()):
        assert sum(any(name in caption for name in names) for caption in captions) > 20


def _seen(x: float, y: float, shape: str = "circle", radius: float = 10.0) -> Seen:
    return Seen(shape, "red", x, y, radius, misfit=0.0)


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        (RED_CIRCLE, None),
        (replace(RED_CIRCLE, size="small"), None),
        (replace(RED_CIRCLE, size="large"), "not large"),
        (replace(RED_CIRCLE, background="grey"), "background white, not grey"),
        (replace(RED_CIRCLE, count=3), "1 object, not 3"),
        (replace(RED_CIRCLE, first=Kind("star", "red")), "no red star"),
        (replace(RED_CIRCLE, first=Kind("circle", "blue")), "no blue circle"),
    ],
)
def test_faults_are_named(asked: Description, fault: str | None) -> None:
    assert mismatch(Reading("white", (_seen(32, 32),)), asked) == fault


def test_a_missing_one_of_several_is_named() -> None:
    reading = Reading("white", (_seen(12, 12), _seen(40, 40, "star")))
    assert mismatch(reading, replace(RED_CIRCLE, count=2)) == "1 red circle, not 2"


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_need_a_clear_distance(relation: str) -> None:
    right, down = reader.DIRECTIONS[relation]
    asked = Description("white", Kind("circle", "red"), 1, None, relation, Kind("star", "red"))
    for along, across, right_so in ((20, 0, True), (20, 15, True), (20, 25, False), (7, 0, False)):
        x, y = 32 + along * right + across * down, 32 + along * down + across * right
        for things in ((_seen(x, y), _seen(32, 32, "star")), (_seen(32, 32, "star"), _seen(x, y))):
            fault = mismatch(Reading("white", things), asked)
            assert fault == (None if right_so else f"not {relation}")
