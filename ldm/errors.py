"""The one exception that is the user's to mend."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""What the system says where no more can be written."""

UNUSABLE = frozenset(
    {*(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR), *(errno.EEXIST, errno.ENAMETOOLONG)}
)
"""What it says of a path without permission, or with a file where a folder is to be."""


class UserError(ValueError):
    """Something outside the code is wrong; the message is one line, names it and the remedy."""


def is_full(error: Exception) -> bool:
    """Whether an error says that no more can be written; safetensors has the system's in words."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"(os error {number})" in str(error) for number in FULL)


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turn a write that the disk does not take into a :class:`UserError` of its file.

    That is ``path`` where the system names none. A path that cannot be used is told likewise.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors has one of its own, which is no OSError.
        file = getattr(error, "filename", None)
        if file and isinstance(error, OSError) and error.errno in UNUSABLE:
            raise UserError(
                f"{file}: cannot be used ({error.strerror}); see what is there, and who may write "
                "it, or give another path"
            ) from error
        if not is_full(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{file or path}: cannot be written ({reason}); make room on that disk and run the "
            "same command again"
        ) from error


@contextmanager
def damage_told(file: Path) -> Iterator[None]:
    """Turn what a damaged file of a run leads to into a :class:`UserError`."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"{file}: is damaged ({error!r}); the command that made the run writes it again"
        ) from error
