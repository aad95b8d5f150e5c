"""A sheet of pictures with their captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, TEXT, GAP = 160, 64, 10
FONT = ImageFont.load_default(12)
"""Pillow's own: it is there on every machine, and has Latin letters only."""
GOOD, BAD, INK, PAPER = (38, 140, 70), (200, 50, 45), (40, 40, 45), (255, 255, 255)


def captioned_grid(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    marks: Sequence[bool | None],
    columns: int,
) -> np.ndarray:
    """uint8 pictures (h, w, 3) to one uint8 sheet; marks frame them green or red."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new(
        "RGB", (columns * (CELL + GAP) + GAP, rows * (CELL + TEXT + GAP) + GAP), PAPER
    )
    draw = ImageDraw.Draw(sheet)
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
    """Break a caption at spaces into lines of ``width`` pixels."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if FONT.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
