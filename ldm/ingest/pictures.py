"""What a downloaded picture must be, and how it becomes plain 8-bit RGB.

img2dataset decodes before it looks at the size, ignores EXIF rotation, turns 16-bit pictures white
and cannot say why one fails; so its worker asks here first.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
"""Larger pictures are not decoded: 64 megapixels are 192 MB."""

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


class RefusedError(Exception):
    """A picture that will not become a sample: the reason in plain words, then particulars."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def plain(content: bytes) -> bytes:
    """The picture's bytes as they are, or as PNG where it is not upright, opaque, 8-bit RGB.

    Raises :class:`RefusedError` when it does not decode to the end or has too many pixels.
    """
    image = _decode(content)
    deep = image.format == "PNG" and content[PNG_BIT_DEPTH] > 8
    turned = image.getexif().get(ORIENTATION, 1) != 1
    clear = image.has_transparency_data
    if image.mode == "RGB" and image.format in PLAIN_FORMATS and not (deep or turned or clear):
        return content
    upright = ImageOps.exif_transpose(image)
    buffer = io.BytesIO()
    _as_rgb(upright).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def check(content: bytes, image_format: str, side: int) -> None:
    """Raise :class:`RefusedError` unless this is whole, RGB, of that format and side in pixels."""
    image = _decode(content)
    expected = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[image_format]
    if (image.format, image.mode, image.size) != (expected, "RGB", (side, side)):
        width, height = image.size
        found = f"{image.format} {image.mode} {width}x{height}"
        raise RefusedError("wrong picture", f"{found}, not {expected} RGB {side}x{side}")


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


def _decode(content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MAX_PIXELS:
            raise RefusedError("too many pixels", f"{image.width}x{image.height}")
        image.load()
    except Image.DecompressionBombError as error:
        raise RefusedError("too many pixels") from error
    except _DAMAGE as error:
        raise diagnose(content) from error
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    """Onto white where it is clear; 16-bit greys keep their high byte."""
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    return image.convert("RGB")
