"""Importing the large libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Look for no garbage while the block imports, and never again among what it made.

    4,000 modules make hundreds of thousands of objects that stay; to look through them, again and
    again as they grow more, was a sixth of a training's start.
    """
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if searching:
            gc.enable()
