"""Names of models whose meaning may change while they are used."""

from __future__ import annotations


def fixed(name: str) -> str:
    """The same name of a model, but for an MLflow alias the version behind it."""
    if not name.startswith("models:/"):
        return name
    from ldm.tracking.registered import pinned  # It brings MLflow, which takes a second.

    return pinned(name)
