"""What the encoders made before, by fingerprint, so that it is not made again.

DVC deletes a stage's outputs before it runs; this folder is none, and outlives that as checkpoints
do. It holds pieces of some hundred arrays, each a safetensors file named by its own sha256 and
written whole or not at all: a killed run leaves all pieces that it finished. Several processes may
add to it at a time.
"""

from __future__ import annotations

import hashlib
from collections import Counter
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
FINGERPRINT_BYTES = 32


def mended(folder: Path) -> Path:
    """Make the folder, or remove from it what kills and damage left; the folder.

    Only while nothing else uses it. What is damaged is dropped with a notice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_by_a_kill in (*folder.glob(".*.writing"), *folder.glob("*.used")):
        left_by_a_kill.unlink()
    for path in sorted(folder.glob("*.safetensors")):
        if not _is_whole(path):
            say(f"encode: {path} is damaged; what it held is encoded again")
            path.unlink()
    return folder


def _is_whole(path: Path) -> bool:
    try:
        return digest_file(path) == path.stem and _open(path) is not None
    except SafetensorError:
        return False


class Encoded:
    """Arrays by fingerprint, in a folder that is :func:`mended`; ``rank`` tells processes apart."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self.added = 0  # Since this was opened.
        self._pieces: list[Path] = []
        self._unused: dict[bytes, int] = {}  # Numbers of pieces. There may be millions of each:
        self._used: dict[bytes, int] = {}  # a fingerprint is in one of these, and is bytes.
        self._unwritten: dict[str, np.ndarray] = {}
        self._opened = lru_cache(maxsize=2)(_open)  # Mapped; what is read of them is resident.
        self._index_new_pieces()

    def _index_new_pieces(self) -> None:
        for path in sorted({*self.folder.glob("*.safetensors")} - {*self._pieces}):
            self._unused |= dict.fromkeys(map(bytes.fromhex, _open(path).keys()), len(self._pieces))
            self._pieces.append(path)

    def __contains__(self, fingerprint: str) -> bool:
        key = bytes.fromhex(fingerprint)
        return key in self._unused or key in self._used or fingerprint in self._unwritten

    def read(self, fingerprint: str) -> np.ndarray:
        """The array of a fingerprint that is here, which is in use from now on."""
        if fingerprint in self._unwritten:
            return self._unwritten[fingerprint]
        piece = self._use(bytes.fromhex(fingerprint))
        return self._opened(self._pieces[piece]).get_tensor(fingerprint)

    def _use(self, key: bytes) -> int:
        if key in self._unused:
            self._used[key] = self._unused.pop(key)
        return self._used[key]

    def add(self, fingerprint: str, values: np.ndarray) -> None:
        """Keep an array, which is in use; it is on disk with the next ``PIECE``, or a flush."""
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
        # With the process in it, no two of them ever write the same file.
        content = save(self._unwritten, {"process": str(self.rank)})
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        write_whole(path, content)
        self._used |= dict.fromkeys(map(bytes.fromhex, self._unwritten), len(self._pieces))
        self._pieces.append(path)
        self._unwritten = {}

    def leave_used(self) -> None:
        """Flush, and leave a file of the fingerprints in use for :meth:`forget_unused`."""
        self.flush()
        write_whole(self.folder / f"{self.rank}.used", b"".join(self._used))

    def forget_unused(self) -> None:
        """Drop pieces that hold what no process used; what was used of them is written anew.

        Nothing is left of a picture that was taken down. Only after all other processes have left
        what they used.
        """
        self._index_new_pieces()
        for path in self.folder.glob("*.used"):
            with path.open("rb") as file:
                while key := file.read(FINGERPRINT_BYTES):
                    self._use(key)
            path.unlink()
        used = Counter(self._used.values())
        going = {
            piece
            for piece, path in enumerate(self._pieces)
            if used[piece] < len(_open(path).keys())
        }
        for key in [key for key, piece in self._used.items() if piece in going]:
            path = self._pieces[self._used.pop(key)]
            self._keep(key.hex(), self._opened(path).get_tensor(key.hex()))
        self.flush()
        for piece in going:
            self._pieces[piece].unlink()


def _open(path: Path) -> Any:
    return safe_open(path, "numpy")
