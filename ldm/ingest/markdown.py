"""Tables in markdown, with words from the open web in them that stay words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MARKUP = re.compile(r"([\\`*_{}\[\]<>#+!|~&:@$])")


def plain(text: str) -> str:
    """A text that shows as it is: no link, no picture to be loaded, no HTML, no further cell."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


def table(head: Sequence[str], lines: Iterable[Sequence[str | float]]) -> str:
    """A table whose numbers stand to the right; texts must be :func:`plain` already."""
    rows = [list(line) for line in lines]
    numeric = [all(not isinstance(row[at], str) for row in rows) for at in range(len(head))]
    rule = ["---:" if right and rows else "---" for right in numeric]
    return "\n".join(_line([_cell(cell) for cell in row]) for row in [head, rule, *rows])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
