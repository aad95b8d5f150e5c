"""Copies of one remote artifact on this machine: the newest version, and others while in use."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from ldm.artifacts import MANIFEST
from ldm.locks import held, is_held

VERSION = re.compile(r"[0-9a-f]{16}")


class Copies:
    """Folders named by a digest of their manifest, and a lock beside each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def alone(self) -> AbstractContextManager[None]:
        """Wait for those who change copies, and keep others from it."""
        refusal = f"{self.folder}: another process is at it"
        return held(self.folder / "lock", refusal, patience_s=math.inf)

    def of(self, manifest: bytes) -> Path:
        """The place of a version."""
        return self.folder / hashlib.sha256(manifest).hexdigest()[:16]

    def in_use(self, copy: Path) -> AbstractContextManager[None]:
        """Keep a copy from being deleted; to be entered :meth:`alone`."""
        return held(_lock(copy), f"{copy}: is being deleted", shared=True)

    def files(self) -> dict[str, Path]:
        """Where a file may be, by sha256; only its bytes can tell."""
        found: dict[str, Path] = {}
        for manifest in self.folder.glob(f"*/{MANIFEST}"):
            content = manifest.read_bytes()
            if self.of(content) == manifest.parent:
                files = json.loads(content)["files"]
                found |= {digest: manifest.parent / name for name, digest in files.items()}
        return found

    def adopt(self, made: Path) -> None:
        """Make an artifact that was written here a copy."""
        with self.alone():
            copy = self.of((made / MANIFEST).read_bytes())
            if copy.exists() and is_held(_lock(copy)):
                shutil.rmtree(made)
            else:
                shutil.rmtree(copy, ignore_errors=True)
                made.rename(copy)
            self.keep_only(copy)

    def keep_only(self, copy: Path) -> None:
        """Delete other copies that nobody uses."""
        for other in sorted(self.folder.iterdir()):
            if VERSION.fullmatch(other.name) and other != copy and not is_held(_lock(other)):
                shutil.rmtree(other)
                _lock(other).unlink(missing_ok=True)


def _lock(copy: Path) -> Path:
    return copy.with_suffix(".lock")
