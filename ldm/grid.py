"""A sheet of pictures with their captions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, TEXT, GAP = 160, 64, 10
FONT = ImageFont.load_default(12)
"""Pillow's own: it is there on every machine, and has the letters of ASCII only."""
LINES, MORE = 4, "…"
"""Of a caption: as many as there is room for, and what stands for the rest."""
GOOD, BAD, INK, PAPER = (38, 140, 70), (200, 50, 45), (40, 40, 45), (255, 255, 255)


def captioned_grid(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    columns: int,
    marks: Sequence[bool | None] | None = None,
) -> np.ndarray:
    """uint8 pictures (h, w, 3) to one uint8 sheet; marks frame them green or red."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new(
        "RGB", (columns * (CELL + GAP) + GAP, rows * (CELL + TEXT + GAP) + GAP), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    marks = marks or [None] * len(pictures)
    for number, (picture, caption, right) in enumerate(zip(pictures, captions, marks, strict=True)):
        x = GAP + number % columns * (CELL + GAP)
        y = GAP + number // columns * (CELL + TEXT + GAP)
        whole = ImageOps.contain(Image.fromarray(picture), (CELL, CELL), Image.Resampling.BICUBIC)
        sheet.paste(whole, (x + (CELL - whole.width) // 2, y + (CELL - whole.height) // 2))
        if right is not None:
            frame = (x - 2, y - 2, x + CELL + 1, y + CELL + 1)
            draw.rectangle(frame, outline=GOOD if right else BAD, width=2)
        draw.multiline_text((x, y + CELL + 4), wrap(caption, CELL), INK, FONT, spacing=3)
    return np.asarray(sheet)


def wrap(text: str, width: int) -> str:
    """Break a caption into lines of ``width`` pixels, at spaces where it has them.

    What is more than ``LINES`` is cut off.
    """
    rest = " ".join(text.split())
    lines: list[str] = []
    while rest and len(lines) < LINES:
        end = _fitting(rest, width)
        if end < len(rest) and " " in rest[: end + 1]:
            end = rest.rindex(" ", 0, end + 1)
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        lines[-1] = lines[-1][: _fitting(lines[-1], width - FONT.getlength(MORE))] + MORE
    return "\n".join(lines)


def _fitting(text: str, width: float) -> int:
    """How many of its letters have room in ``width`` pixels; at least one."""
    ends = range(2, len(text) + 1)
    return 1 + bisect_right(ends, width, key=lambda end: FONT.getlength(text[:end]))
