"""Optional columns of a list: a licence, and scores that others gave the pictures.

Names are those of LAION's lists: ``punsafe`` and ``pwatermark`` are probabilities, ``aesthetic`` is
a mark, usually from 1 to 10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ldm.config import Ingest
from ldm.ingest.reasons import RefusedError

LICENSE = "license"
SCORES = {"punsafe": (0, 1), "pwatermark": (0, 1), "aesthetic": (-10_000, 10_000)}
"""Least and most that a number in the column may be."""
RATINGS = (LICENSE, *SCORES)
"""The optional columns."""


def ratings(cells: Mapping[str, str]) -> dict[str, str | float]:
    """A row's filled cells by column, scores as numbers.

    Raises :class:`RefusedError` when a score is not a number that it may be.
    """
    return {
        name: cells[name] if name == LICENSE else _score(name, cells[name])
        for name in RATINGS
        if name in cells
    }


def check_ratings(cells: Mapping[str, str], config: Ingest) -> None:
    """Raise :class:`RefusedError` unless a row is within the limits of the configuration.

    Where there is a limit, a row without a value is outside it: nobody knows what it shows.
    """
    rated = ratings(cells)
    for name, most in (("punsafe", config.max_punsafe), ("pwatermark", config.max_pwatermark)):
        if most is not None and _given(rated, name) > most:
            raise RefusedError(f"{name} too high", f"{rated[name]}, at most {most} is allowed")
    least = config.min_aesthetic
    if least is not None and _given(rated, "aesthetic") < least:
        raise RefusedError("aesthetic too low", f"{rated['aesthetic']}, at least {least} is wanted")
    if config.licenses is not None:
        _check_license(str(rated.get(LICENSE, "")), config.licenses)


def _check_license(name: str, allowed: tuple[str, ...]) -> None:
    if name.casefold() not in {one.casefold() for one in allowed}:
        raise RefusedError("license not allowed", name or "none is given")


def _given(rated: Mapping[str, str | float], name: str) -> float:
    if name not in rated:
        raise RefusedError("no score", f"{name} is empty")
    return float(rated[name])


def _score(name: str, cell: str) -> float:
    least, most = SCORES[name]
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not least <= score <= most:
        raise RefusedError("bad score", f"{name} is {cell!r}, not a number from {least} to {most}")
    return score
