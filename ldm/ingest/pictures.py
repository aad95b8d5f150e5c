"""What a downloaded picture must be, and how it becomes plain 8-bit RGB.

img2dataset decodes before it looks at the size, ignores EXIF rotation, turns 16-bit pictures white
and cannot say why one fails; so its worker asks here first.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageCms
from PIL.JpegImagePlugin import JpegImageFile

from ldm.ingest.buckets import Size
from ldm.ingest.reasons import RefusedError

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation to what turns such a picture upright."""
PNG_BIT_DEPTH = 24
"""Where a PNG says how many bits a channel has; Pillow does not tell for colours."""
PNG_FRAMES = (b"acTL", b"fcTL", b"fdAT")
"""Chunks of a moving PNG."""
PLAIN_FORMATS = ("JPEG", "PNG", "WEBP")
GREYS = ("1", "L", "La", "LA")


@dataclass(frozen=True)
class Rules:
    """Which pictures become samples, and how."""

    formats: tuple[str, ...]
    """Pillow's names; the bytes tell, not the URL."""
    max_pixels: int
    """Larger ones are not decoded."""
    min_side: int
    """In pixels: smaller ones would be blown up."""
    max_aspect: float
    """Longer over shorter side; of more extreme ones a centre crop shows next to nothing."""
    background: str
    """What shows where a picture is clear: a colour as Pillow knows them."""
    animations: str
    """``first`` frame, or ``skip``."""
    sizes: tuple[Size, ...]
    """Each becomes the :func:`~ldm.ingest.buckets.nearest` of these."""


def plain(content: bytes, rules: Rules) -> bytes:
    """The picture's bytes as they are, or as PNG where it is not one upright, opaque, 8-bit sRGB.

    Raises :class:`RefusedError`, and nothing else, when it does not decode to the end or is against
    the rules.
    """
    with _judged(content):
        image = _opened(content, rules)
        depth = content[PNG_BIT_DEPTH] if image.format == "PNG" else 8
        turn, profile = _turn(image), _profile(image)
        if _handy(image, content, depth) and turn is None and profile is None:
            return content
        upright = image if turn is None else image.transpose(turn)
        buffer = io.BytesIO()
        _as_rgb(upright, depth, profile, rules.background).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def checked(content: bytes, image_format: str, size: Size) -> Image.Image:
    """The decoded picture.

    Raises :class:`RefusedError` unless it is whole, RGB, of that format and size.
    """
    expected = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[image_format]
    with _judged(content):
        image = _opened(content, None)
    if (image.format, image.mode, image.size) != (expected, "RGB", size):
        width, height = image.size
        found = f"{image.format} {image.mode} {width}x{height}"
        raise RefusedError("wrong picture", f"{found}, not {expected} RGB {size[0]}x{size[1]}")
    return image


def diagnose(content: bytes) -> RefusedError:
    """Why bytes that do not decode fail: ``not an image``, ``truncated`` or ``damaged``."""
    start = content[:64].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<svg")):
        return RefusedError("not an image", "a web page or other markup")
    if content.startswith(b"\xff\xd8\xff"):
        whole = b"\xff\xd9" in content[-64:]
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        whole = b"IEND\xaeB`\x82" in content[-64:]
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        whole = len(content) >= int.from_bytes(content[4:8], "little") + 8
    elif content.startswith((b"GIF87a", b"GIF89a")):
        whole = content.endswith(b";")
    else:
        return RefusedError("not an image", "no known picture format" if content else "no bytes")
    if whole:
        return RefusedError("damaged", "does not decode")
    return RefusedError("truncated", f"ends early, after {len(content)} bytes")


@contextmanager
def _judged(content: bytes) -> Iterator[None]:
    """What the bytes of a picture lead to in the block, if not a picture, is a refusal of them.

    There is no list of what Pillow raises on hostile bytes: assertions and look-ups fail as well.
    """
    try:
        yield
    except RefusedError:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedError("too many pixels") from error
    except Exception as error:
        raise diagnose(content) from error


def _opened(content: bytes, rules: Rules | None) -> Image.Image:
    """Decoded to the end; what the header says is held against the rules before.

    Phones put a second picture into a JPEG. Pillow would call that MPO and an animation, and refuse
    it where the place of the second one is damaged; its reader of plain JPEGs sees the first alone.
    """
    stream = io.BytesIO(content)
    image = JpegImageFile(stream) if content.startswith(b"\xff\xd8\xff") else Image.open(stream)
    if rules:
        _check_header(image, rules)
    image.load()
    return image


def _check_header(image: Image.Image, rules: Rules) -> None:
    size = f"{image.width}x{image.height}"
    short, long = sorted(image.size)
    if image.format not in rules.formats:
        raise RefusedError("format not allowed", f"{image.format}")
    if image.width * image.height > rules.max_pixels:
        raise RefusedError("too many pixels", size)
    if short < rules.min_side:
        raise RefusedError("too small", size)
    if long > rules.max_aspect * short:
        raise RefusedError("too narrow", size)
    if rules.animations == "skip" and (frames := _frames(image)) > 1:
        raise RefusedError("animation", f"{frames} frames")


def _frames(image: Image.Image) -> int:
    """Pillow gives the number only to pictures of the formats that may have several."""
    return getattr(image, "n_frames", 1)


def _handy(image: Image.Image, content: bytes, depth: int) -> bool:
    """Whether OpenCV sees in the bytes what Pillow does, were it not for EXIF and colour profiles.

    In some moving PNGs it sees another frame, and of some with a wrong count of frames, which are
    still ones to Pillow, it dies.
    """
    if image.mode != "RGB" or depth != 8 or image.has_transparency_data:
        return False
    if image.format == "PNG" and any(name in content for name in PNG_FRAMES):
        return False
    return image.format in PLAIN_FORMATS and _frames(image) == 1


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns it upright, None if it is; EXIF that cannot be read says nothing."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow reads it now, and by what the file claims: anything may be raised.
        return None


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The embedded colour profile, if it is usable and not sRGB's own."""
    content = image.info.get("icc_profile")
    if not content:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        name = ImageCms.getProfileDescription(profile)
    except (OSError, TypeError, ImageCms.PyCMSError):  # A PNG may have a text of that name.
        return None
    return None if "sRGB" in name else profile


def _as_rgb(
    image: Image.Image, depth: int, profile: ImageCms.ImageCmsProfile | None, background: str
) -> Image.Image:
    """Its colours as sRGB's, on the background where it is clear, and nothing beside the pixels."""
    colours, alpha = _parted(image, depth)
    rgb = _in_srgb(colours, profile)
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, background), rgb).convert("RGB")
    rgb.info = {}
    return rgb


def _parted(image: Image.Image, depth: int) -> tuple[Image.Image, Image.Image | None]:
    """The colours, of 8 bits and in no palette, and how opaque they are, if not everywhere.

    ``depth``: bits a channel in the file.
    """
    if image.mode.startswith("I"):
        return _parted_16_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode == "P" else image, None
    value = image.info.get("transparency")  # As in the file, not as the pixels by now.
    if image.mode == "L" and value is not None:
        image.info["transparency"] = _in_8_bits(value, depth)
    elif image.mode == "RGB" and value is not None:
        image.info["transparency"] = tuple(_in_8_bits(one, depth) for one in value)
    clear = image.convert("LA" if image.mode in GREYS else "RGBA")
    return clear.convert(clear.mode[:-1]), clear.getchannel("A")


def _parted_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The high bytes of 16-bit greys; clear where all 16 bits are the transparent value's."""
    deep = np.clip(np.asarray(image), 0, 2**16 - 1)
    grey = Image.fromarray((deep >> 8).astype(np.uint8))
    if "transparency" not in image.info:
        return grey, None
    opaque = deep != image.info["transparency"]
    return grey, Image.fromarray(opaque.astype(np.uint8) * 255)


def _in_8_bits(value: int, depth: int) -> int:
    return value >> 8 if depth > 8 else value * 255 // (2**depth - 1)


def _in_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> Image.Image:
    """As RGB, another object than the picture."""
    if profile is not None:
        try:
            converted = ImageCms.profileToProfile(image, profile, _srgb(), outputMode="RGB")
            assert converted is not None  # As it is not done in place.
            return converted
        except ImageCms.PyCMSError:
            pass  # A profile of another kind of colour than the pixels': their plain values hold.
    return image.convert("RGB")


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
