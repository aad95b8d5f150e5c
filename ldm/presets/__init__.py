"""Params files that come with the package."""

from __future__ import annotations

from pathlib import Path


def presets() -> dict[str, Path]:
    """Each by its name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
