"""Pictures as they come in: each ends as plain upright 8-bit RGB, or refused for its reason."""

from __future__ import annotations

import io
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from ldm.config import Ingest
from ldm.ingest.captions import cleaned
from ldm.ingest.fetch import rules_of
from ldm.ingest.pictures import checked, diagnose, plain
from ldm.ingest.reasons import RefusedError
from ldm.scenes.lists import scene_of
from ldm.scenes.render import draw

RULES = rules_of(Ingest())
UPRIGHT = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""EXIF orientation to the Pillow transpose that makes a stored picture of an upright one."""


def scene(row: int) -> np.ndarray:
    return draw(scene_of("retrain", "train", row)[1])


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    """Four corners of different colours, smooth in between: 64 high, 96 wide."""
    y, x = np.mgrid[0:1:64j, 0:1:96j]
    return (255 * np.stack([x, y, 1 - (x + y) / 2], axis=-1)).astype(np.uint8)


def stored(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    return stored(Image.fromarray(pixels))


def taken(content: bytes, **changes: Any) -> np.ndarray:
    image = Image.open(io.BytesIO(plain(content, replace(RULES, **changes))))
    assert image.mode == "RGB"
    assert not image.getexif()
    return np.asarray(image).astype(int)


def refusal(content: bytes, **changes: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        plain(content, replace(RULES, **changes))
    return caught.value.reason


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_rotated_pictures_are_turned_upright(
    reference: np.ndarray, orientation: int, form: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = Image.fromarray(reference).transpose(UPRIGHT[orientation])
    found = taken(stored(turned, form, exif=exif, quality=95))
    assert found.shape == reference.shape
    assert np.abs(found - reference).mean() < 3


@pytest.mark.parametrize(
    ("mode", "form", "tolerance"),
    [("RGB", "PNG", 0), ("RGB", "JPEG", 2), ("RGB", "WEBP", 4), ("RGB", "GIF", 12),
     ("P", "PNG", 12), ("CMYK", "JPEG", 3), ("RGBA", "PNG", 0), ("YCbCr", "JPEG", 3)],
)  # fmt: skip
def test_colours_stay(reference: np.ndarray, mode: str, form: str, tolerance: float) -> None:
    image = Image.fromarray(reference)
    image = image.quantize(256) if mode == "P" else image.convert(mode)
    options = {"quality": 95} if form in ("JPEG", "WEBP") else {}
    found = taken(stored(image, form, **options))
    assert np.abs(found - reference).mean() <= tolerance


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16),
        Image.fromarray((np.arange(64 * 64) // 16).astype(np.uint8).reshape(64, 64)),
    ],
    ids=["16 bits", "8 bits"],
)
def test_greys_keep_their_depth(image: Image.Image) -> None:
    grey = (np.arange(64 * 64) // 16).reshape(64, 64)
    found = taken(stored(image))
    assert np.abs(found - grey[..., None]).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize(("background", "shown"), [("white", 255), ("#000000", 0), ("grey", 128)])
def test_the_background_shows_through(form: str, background: str, shown: int) -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:32] = (200, 200, 200, 128)
    found = taken(stored(Image.fromarray(pixels), form, lossless=True), background=background)
    assert (found[32:] == shown).all()
    assert np.abs(found[:32] - (200 + shown) / 2).max() <= 2


def test_a_clear_palette_colour_shows_the_background() -> None:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert (taken(stored(image, transparency=1)) == 255).all()
    assert (taken(stored(image, "GIF", transparency=0)) == (10, 20, 30)).all()


def test_animations_by_policy() -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    moving = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (taken(moving) == (255, 0, 0)).all()
    assert refusal(moving, animations="skip") == "animation"
    assert (taken(stored(frames[1], "GIF"), animations="skip") == (0, 0, 255)).all()


@pytest.mark.parametrize(
    ("size", "changes", "reason"),
    [
        ((64, 63), {}, "too small"),
        ((64, 64), {"min_side": 65}, "too small"),
        ((64, 257), {}, "too narrow"),
        ((257, 64), {}, "too narrow"),
        ((64, 64), {"max_pixels": 4095}, "too many pixels"),
        ((64, 64), {"formats": ("JPEG",)}, "format not allowed"),
    ],
)
def test_what_is_against_the_rules_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], changes: dict[str, Any], reason: str
) -> None:
    content = stored(Image.new("RGB", size))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert refusal(content, **changes) == reason


def test_a_bitmap_is_not_taken_by_default() -> None:
    content = stored(Image.new("RGB", (64, 64)), "BMP")
    assert refusal(content) == "format not allowed"
    assert taken(content, formats=("BMP",)).shape == (64, 64, 3)


def test_a_profile_of_another_kind_is_left_alone(reference: np.ndarray) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (lab, srgb, b"no profile"):
        found = taken(stored(Image.fromarray(reference), icc_profile=profile))
        assert np.abs(found - reference).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_picture_that_ends_early_is_truncated(form: str, share: float) -> None:
    for row in range(8):
        content = stored(Image.fromarray(scene(row)), form)
        assert plain(content, RULES)
        assert refusal(content[: int(len(content) * share)]) == "truncated"


def test_a_picture_with_a_damaged_middle_is_not_called_truncated() -> None:
    content = bytearray(png(scene(0)))
    content[len(content) // 2] ^= 0xFF
    assert refusal(bytes(content)) == "damaged"
    assert diagnose(b"<!DOCTYPE html>").reason == "not an image"


def test_a_plain_picture_is_handed_on_untouched() -> None:
    assert plain(png(scene(0)), RULES) == png(scene(0))


@pytest.mark.parametrize(
    ("content", "image_format", "size"),
    [
        (png(scene(0)), "png", (32, 64)),
        (png(scene(0)), "jpg", (64, 64)),
        (png(scene(0)[:32]), "png", (32, 64)),
        (png(scene(0)[..., 0]), "png", (64, 64)),
        (png(scene(0))[:300], "png", (64, 64)),
    ],
)
def test_checked_refuses_other_pictures(
    content: bytes, image_format: str, size: tuple[int, int]
) -> None:
    assert checked(png(scene(0)[:32]), "png", (64, 32)).size == (64, 32)
    with pytest.raises(RefusedError):
        checked(content, image_format, size)


# --- captions


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("  a  red\n\tcircle ", "a red circle"),
        ("cafe\u0301", "caf\u00e9"),
        ("nul\x00 and bell\x07", "nul and bell"),
        ("a \u202edlrow\u202c b", "a dlrow b"),
        ("\ufeffmark\u200b", "mark"),
        ("一个红色圆形，灰色背景", "一个红色圆形，灰色背景"),
        ("family \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
         "family \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f"),
        ("\u3000\xa0", ""),
        ("lone \ud800 half", "lone half"),
        ("e\u200b\u0301", "\u00e9"),
        ("e\x07\u0323\u202e\u0302", "\u1ec7"),
    ],
)  # fmt: skip
def test_captions_come_clean(caption: str, expected: str) -> None:
    assert cleaned(caption, 100) == expected


def test_long_captions_are_cut_between_words() -> None:
    assert cleaned("three short words", 12) == "three short"
    assert cleaned("three short words", 11) == "three short"
    assert cleaned("一个红色圆形", 3) == "一个红"
    assert cleaned("ab\u200dc", 3) == "ab"
    assert cleaned("a \u200d b", 4) == "a"


MARKED = st.sampled_from(
    "eo가ᄀ\u0301\u0323\u0327\u0302\u1161\u200b\u200d\u202e\ufe0f\u0958\u2000 \a"
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.text(st.characters() | MARKED, max_size=60), st.integers(1, 50))
def test_cleaning_ends_and_holds(caption: str, most: int) -> None:
    once = cleaned(caption, most)
    assert unicodedata.is_normalized("NFC", once)
    assert len(once) <= most
    assert once.strip() == once
    assert cleaned(once, most) == once
    once.encode()
