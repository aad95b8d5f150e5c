"""Sites that say no: ``X-Robots-Tag`` directives against training and indexing."""

from __future__ import annotations

from collections.abc import Iterable

DENIALS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
WITH_VALUE = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)
"""Directives that have a colon themselves; any other name before one is an agent's."""


def opted_out(headers: Iterable[str], agent: str) -> str | None:
    """The first directive of ``X-Robots-Tag`` values that denies ``agent``; None if none does.

    A value is a list of directives for all, or for the agent named before them; joined values may
    name several agents one after the other.
    """
    for value in headers:
        speaks_to_us = True
        for part in value.lower().split(","):
            name, colon, rest = (one.strip() for one in part.partition(":"))
            if colon and name not in WITH_VALUE:
                speaks_to_us = name in ("*", agent.lower())
                name = rest.partition(":")[0].strip()
            if speaks_to_us and name in DENIALS:
                return name
    return None
