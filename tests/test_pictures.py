"""Pictures as they come in: each ends as plain upright 8-bit RGB, or refused for its reason."""

from __future__ import annotations

import io
import struct
import unicodedata
import zlib
from dataclasses import replace
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

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
PNG_START = b"\x89PNG\r\n\x1a\n"


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


def png_of(depth: int, colour: int, row: bytes, transparent: bytes) -> bytes:
    """64x64, all rows alike; Pillow writes few kinds."""
    header = struct.pack(">IIBBBBB", 64, 64, depth, colour, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress((b"\0" + row) * 64))
    return PNG_START + b"".join(chunk(*one) for one in (*chunks, (b"IEND", b"")))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def taken(content: bytes, **changes: Any) -> np.ndarray:
    """The pixels that OpenCV sees in what is handed on to img2dataset."""
    handed = plain(content, replace(RULES, **changes))
    image = Image.open(io.BytesIO(handed))
    assert image.mode == "RGB"
    assert not image.getexif()
    pixels = cv2.imdecode(np.frombuffer(handed, np.uint8), cv2.IMREAD_UNCHANGED)
    return pixels[..., ::-1].astype(int)


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


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"none", b"II", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\x01"]
)
def test_a_picture_with_unreadable_exif_is_handed_on(
    reference: np.ndarray, form: str, exif: bytes
) -> None:
    content = stored(Image.fromarray(reference), form, exif=b"Exif\0\0" + exif)
    assert exif in content
    assert plain(content, RULES) == content


@pytest.mark.parametrize("name", ["exif", "Raw profile type exif", "xmp", "icc_profile"])
def test_a_text_of_a_png_is_no_exif_and_no_profile(reference: np.ndarray, name: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text(name, "words\n" * 4)
    content = stored(Image.fromarray(reference), pnginfo=text)
    assert plain(content, RULES) == content


def test_of_a_jpeg_with_more_pictures_the_first_is_taken(reference: np.ndarray) -> None:
    first, second = Image.fromarray(reference), Image.fromarray(255 - reference)
    content = stored(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(content)).format == "MPO"
    index = content.index(b"MPF\0")
    broken = content[: index + 12] + b"\xff" * 40 + content[index + 52 :]
    for one in (content, broken):
        assert np.abs(taken(one, animations="skip") - reference).mean() <= 2
        assert plain(one, RULES) == one
    assert refusal(content, formats=("PNG",)) == "format not allowed"


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


def test_a_clear_grey_shows_the_background() -> None:
    """All of its bits count: 16384 and 16385 have the same high byte."""
    deep = np.full((64, 64), 2**14, np.uint16)
    deep[32:] += 1
    found = taken(stored(Image.fromarray(deep), transparency=2**14 + 1), background="red")
    assert (found[:32] == 64).all()
    assert (found[32:] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("depth", "colour", "value", "left"),
    [(2, 0, b"\0\3", b"\xff" * 8), (4, 0, b"\0\x0f", b"\xff" * 16),
     (8, 0, b"\0\xff", b"\xff" * 32), (8, 2, b"\0\xff" * 3, b"\xff" * 96),
     (16, 0, b"\x40\0", b"\x40\0" * 32), (16, 2, b"\x40\0" * 3, b"\x40\0" * 96)],
)  # fmt: skip
def test_the_clear_value_of_a_png_is_one_of_its_depth(
    depth: int, colour: int, value: bytes, left: bytes
) -> None:
    content = png_of(depth, colour, left + bytes(len(left)), value)
    found = taken(content, background="red")
    assert (found[:, :32] == (255, 0, 0)).all()
    assert (found[:, 32:] == 0).all()


@pytest.mark.parametrize(
    ("form", "options"),
    [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("PNG", {"default_image": True})],
)
def test_animations_by_policy(form: str, options: dict[str, bool]) -> None:
    """OpenCV would take the second frame of a PNG whose first is for those who show no others."""
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "lime")]
    moving = stored(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(moving)).n_frames == 3  # type: ignore[attr-defined]
    assert (taken(moving) == (255, 0, 0)).all()
    assert refusal(moving, animations="skip") == "animation"
    still = stored(frames[1], form, **options)
    assert (taken(still, animations="skip") == (0, 0, 255)).all()


def test_a_moving_png_is_not_handed_on() -> None:
    """OpenCV dies of this one."""
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "lime")]
    content = bytearray(stored(frames[0], save_all=True, append_images=frames[1:]))
    content[content.index(b"acTL") + 4] = 0xFF
    hostile = sealed(bytes(content))
    with pytest.warns(UserWarning, match="Invalid APNG"):
        handed = plain(hostile, RULES)
    assert handed != hostile and b"fcTL" not in handed
    assert (taken(handed) == (255, 0, 0)).all()


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


@cache
def swapped_profile() -> bytes:
    """sRGB with red and blue exchanged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = srgb.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
    return exchanged.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def grey_profile() -> bytes:
    """Of sRGB's curve, but with an exponent of 1.2 where that has 2.4."""
    renamed = swapped_profile().replace(b"RGB XYZ ", b"GRAYXYZ ").replace(b"rTRC", b"kTRC")
    return renamed.replace(b"\0\2\x66\x66", b"\0\1\x33\x33")


def half_clear(image: Image.Image) -> Image.Image:
    """Its left half."""
    image = image.convert("LA" if image.mode == "L" else "RGBA")
    image.paste(0, (0, 0, image.width // 2, image.height))
    return image


@pytest.mark.parametrize(
    ("form", "palette", "clear", "tolerance"),
    [("PNG", False, False, 1), ("JPEG", False, False, 3), ("WEBP", False, False, 1),
     ("PNG", True, False, 12), ("PNG", False, True, 1), ("WEBP", False, True, 1),
     ("PNG", True, True, 12)],
)  # fmt: skip
def test_colours_of_a_profile_become_srgb(
    reference: np.ndarray, form: str, palette: bool, clear: bool, tolerance: float
) -> None:
    image, expected = Image.fromarray(reference[..., ::-1]), reference.copy()
    if clear:
        image = half_clear(image)
        expected[:, : image.width // 2] = 255
    if palette:
        image = image.quantize(256, Image.Quantize.FASTOCTREE if clear else None)
    options = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[form]
    found = taken(stored(image, form, icc_profile=swapped_profile(), **options))
    assert np.abs(found - expected).mean() <= tolerance


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_greys_of_a_profile_become_srgb(clear: bool, deep: bool) -> None:
    grey = np.tile(np.arange(16, 256, dtype=np.uint8), (64, 1))
    light = ((grey / 255 + 0.055) / 1.055) ** 1.2
    expected = (1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(expected - grey).max() > 50
    options: dict[str, Any] = {"icc_profile": grey_profile()}
    image = Image.fromarray(grey.astype(np.uint16) << 8 if deep else grey)
    if clear:
        options["transparency"] = 200 << 8 if deep else 200
        expected[grey == 200] = 255
    found = taken(stored(image, **options))
    assert np.abs(found - expected[..., None]).max() <= 2


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


@cache
def laden(form: str, mode: str) -> bytes:
    """A small picture with EXIF and a colour profile, where its form has room for them."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    image = Image.fromarray(scene(0)[:16, :16]).convert(mode)
    return stored(image, form, exif=exif, icc_profile=swapped_profile())


def sealed(content: bytes) -> bytes:
    """A PNG with the checksums of what its chunks are now, as far as there are whole ones."""
    chunks, at = [PNG_START], len(PNG_START)
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        chunks.append(chunk(content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(chunks)


FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6)


@settings(max_examples=1000)
@given(
    st.sampled_from(
        [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "L"),
         ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("GIF", "P")]
    ),
    st.sampled_from(["first", "skip"]),
    FLIPS,
)  # fmt: skip
def test_whatever_the_bytes_there_is_a_picture_or_a_refusal(
    kind: tuple[str, str], animations: str, flips: list[tuple[float, int]]
) -> None:
    content = bytearray(laden(*kind))
    for place, value in flips:
        content[int(place * len(content))] ^= value
    hostile = sealed(bytes(content)) if kind[0] == "PNG" else bytes(content)
    try:
        handed = plain(hostile, replace(RULES, min_side=1, animations=animations))
    except RefusedError:
        return
    assert Image.open(io.BytesIO(handed)).mode == "RGB"


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


@settings(max_examples=500)
@given(st.text(st.characters() | MARKED, max_size=60), st.integers(1, 50))
def test_cleaning_ends_and_holds(caption: str, most: int) -> None:
    once = cleaned(caption, most)
    assert unicodedata.is_normalized("NFC", once)
    assert len(once) <= most
    assert once.strip() == once
    assert cleaned(once, most) == once
    once.encode()
