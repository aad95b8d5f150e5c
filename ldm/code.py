"""Which code and libraries decide a result, so that it is made anew when they are others."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from ldm.artifacts import digest_file

ROOT = Path(__file__).parent


def digests(*modules: str) -> list[str]:
    """sha256 of modules of ``ldm``, in that order: ``nn/unet`` is one, ``nn`` all of a folder."""
    return [digest_file(file) for module in modules for file in _files(module)]


def _files(module: str) -> list[Path]:
    folder = ROOT / module
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def versions(*libraries: str) -> dict[str, str]:
    """The installed version of each library."""
    return {name: version(name) for name in libraries}
