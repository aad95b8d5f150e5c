"""The commit of the code that is running."""

from __future__ import annotations

import subprocess


def code_commit() -> str | None:
    """The commit checked out here, with ``-dirty`` after changes; none outside git.

    ``dvc.lock`` and ``*.dvc`` name data and results, which have digests of their own.
    """
    code = ["--", ":/", ":(exclude,top)dvc.lock", ":(exclude,glob)**/*.dvc"]
    try:
        head = _git("rev-parse", "--verify", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", *code)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
