"""What a downloaded picture must be, and how it becomes plain 8-bit RGB.

img2dataset decodes before it looks at the size, ignores EXIF rotation, turns 16-bit pictures white
and cannot say why one fails; so its worker asks here first.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ldm.ingest.buckets import Size
from ldm.ingest.reasons import RefusedError

ORIENTATION = 0x0112
PNG_BIT_DEPTH = 24
"""Where a PNG says how many bits a channel has; Pillow does not tell for colours."""
PLAIN_FORMATS = ("JPEG", "PNG", "WEBP")

_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on bytes that are not a whole picture."""


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
    """The picture's bytes as they are, or as PNG where it is not upright, opaque, 8-bit sRGB.

    Raises :class:`RefusedError` when it does not decode to the end or is against the rules.
    """
    image = _decode(content, rules)
    deep = image.format == "PNG" and content[PNG_BIT_DEPTH] > 8
    turned = image.getexif().get(ORIENTATION, 1) != 1
    clear = image.has_transparency_data
    profile = _profile(image)
    handy = image.mode == "RGB" and image.format in PLAIN_FORMATS
    if handy and not (deep or turned or clear or profile):
        return content
    upright = ImageOps.exif_transpose(image)
    buffer = io.BytesIO()
    _as_rgb(upright, profile, rules.background).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def checked(content: bytes, image_format: str, size: Size) -> Image.Image:
    """The decoded picture.

    Raises :class:`RefusedError` unless it is whole, RGB, of that format and size.
    """
    image = _opened(content, None)
    expected = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[image_format]
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


def _decode(content: bytes, rules: Rules) -> Image.Image:
    image = _opened(content, rules)
    frames = getattr(image, "n_frames", 1)
    if rules.animations == "skip" and frames > 1:
        raise RefusedError("animation", f"{frames} frames")
    return image


def _opened(content: bytes, rules: Rules | None) -> Image.Image:
    """Decoded to the end; what the header says is held against the rules before."""
    try:
        image = Image.open(io.BytesIO(content))
        if rules:
            _check_header(image, rules)
        image.load()
    except Image.DecompressionBombError as error:
        raise RefusedError("too many pixels") from error
    except _DAMAGE as error:
        raise diagnose(content) from error
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


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The embedded colour profile, if it is usable and not sRGB's own."""
    content = image.info.get("icc_profile")
    if not content:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        name = ImageCms.getProfileDescription(profile)
    except (OSError, ImageCms.PyCMSError):
        return None
    return None if "sRGB" in name else profile


def _as_rgb(
    image: Image.Image, profile: ImageCms.ImageCmsProfile | None, background: str
) -> Image.Image:
    """Onto the background where it is clear; of 16-bit greys the high byte; colours as sRGB's."""
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), clear)
    elif image.mode.startswith("I"):
        deep = np.clip(np.asarray(image).astype(np.int64), 0, 2**16 - 1)
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    elif profile is not None:
        try:
            return ImageCms.profileToProfile(image, profile, _srgb(), outputMode="RGB") or image
        except ImageCms.PyCMSError:
            pass  # A profile of another kind of colour than the pixels': their plain values hold.
    return image.convert("RGB")


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
