"""What the encoders made before, by fingerprint, so that it is not made again.

DVC deletes a stage's outputs before it runs; this folder is none, and outlives that as checkpoints
do. It holds pieces of some hundred arrays, each a safetensors file named by its own sha256 and
written whole or not at all: a killed run leaves all pieces that it finished.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ldm.artifacts import digest_file, write_whole
from ldm.progress import say

PIECE = 256
"""Arrays a piece: so many are lost when a run is killed, and in memory until they are written."""


class Encoded:
    """Arrays by fingerprint, in a folder.

    Every piece's bytes are checked once, on opening; a damaged one is dropped with a notice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.added = 0  # Since this was opened.
        self._used: set[str] = set()
        self._piece_of: dict[str, Path] = {}
        self._unwritten: dict[str, np.ndarray] = {}
        self._opened = lru_cache(maxsize=8)(_open)
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in folder.glob(".*.writing"):
            left_by_a_kill.unlink()
        for path in sorted(folder.glob("*.safetensors")):
            self._add_piece(path)

    def _add_piece(self, path: Path) -> None:
        try:
            if digest_file(path) == path.stem:
                self._piece_of |= dict.fromkeys(_open(path).keys(), path)
                return
        except SafetensorError:
            pass
        say(f"encode: {path} is damaged; what it held is encoded again")
        path.unlink()

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self._piece_of or fingerprint in self._unwritten

    def read(self, fingerprint: str) -> np.ndarray:
        """The array of a fingerprint that is here, which is in use from now on."""
        self._used.add(fingerprint)
        if fingerprint in self._unwritten:
            return self._unwritten[fingerprint]
        return self._opened(self._piece_of[fingerprint]).get_tensor(fingerprint)

    def add(self, fingerprint: str, values: np.ndarray) -> None:
        """Keep an array; it is on disk with the next ``PIECE``, or after :meth:`flush`."""
        self.added += 1
        self._keep(fingerprint, values)

    def _keep(self, fingerprint: str, values: np.ndarray) -> None:
        self._unwritten[fingerprint] = np.ascontiguousarray(values)  # Else save() mixes it up.
        if len(self._unwritten) >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet on disk."""
        if not self._unwritten:
            return
        content = save(self._unwritten)
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        write_whole(path, content)
        self._piece_of |= dict.fromkeys(self._unwritten, path)
        self._unwritten = {}

    def forget_unused(self) -> None:
        """Drop pieces less than half of which was read; what was read of them is written anew.

        The folder is thus never more than about twice as large as what is in use.
        """
        used: dict[Path, list[str]] = {path: [] for path in self.folder.glob("*.safetensors")}
        for fingerprint in self._used:
            used[self._piece_of[fingerprint]].append(fingerprint)
        going = {path for path, some in used.items() if 2 * len(some) < len(_open(path).keys())}
        for path in going:
            for fingerprint in used[path]:
                self._keep(fingerprint, self._opened(path).get_tensor(fingerprint))
        self.flush()
        for path in going:
            path.unlink()
        self._piece_of = {key: path for key, path in self._piece_of.items() if path not in going}


def _open(path: Path) -> Any:
    return safe_open(path, "numpy")
