"""Importing the large libraries without a search for garbage among what stays."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from ldm.importing import quick_imports

COUNTS = """
import gc, sys
from ldm.importing import quick_imports
before = sum(one["collections"] for one in gc.get_stats())
with quick_imports():
    import torch
after = sum(one["collections"] for one in gc.get_stats())
print(after - before, gc.get_freeze_count() > len(sys.modules), gc.isenabled())
"""


def test_nothing_is_searched_meanwhile_and_what_came_is_left_alone_afterwards() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNTS], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["0", "True", "True"]


def test_after_a_failed_import_garbage_is_searched_again() -> None:
    with pytest.raises(ModuleNotFoundError), quick_imports():
        import ldm.not_there  # noqa: F401
    assert gc.isenabled()


def test_a_block_in_another_leaves_the_search_to_that() -> None:
    with quick_imports():
        with quick_imports():
            pass
        assert not gc.isenabled()
