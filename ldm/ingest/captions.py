"""Captions as they should be: one line of visible characters in one normal form."""

from __future__ import annotations

import unicodedata

MARKS = frozenset(
    "\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
)
"""Controls of writing direction, which show a text as another than it is, and empty characters."""
HIDDEN = frozenset({"Cc", "Cs", "Co"})
"""Unicode's categories of controls, halves of surrogate pairs and private characters."""
JOINERS = "\u200d\ufe0e\ufe0f"


def cleaned(caption: str, most: int) -> str:
    """NFC, at most ``most`` characters, white space as single spaces, nothing hidden.

    Emoji keep their joiners and variation selectors. A longer caption is cut between words where
    there are any.
    """
    spaced = "".join(" " if one.isspace() else one for one in caption)
    visible = (
        one for one in spaced if one not in MARKS and unicodedata.category(one) not in HIDDEN
    )
    # Last, as letters and accents join where something hidden was between them.
    text = unicodedata.normalize("NFC", " ".join("".join(visible).split()))
    if len(text) <= most:
        return text
    head, space, _ = text[: most + 1].rpartition(" ")
    return (head if space else text[:most]).rstrip(JOINERS + " ")
