"""The format of the latents artifact, and reading it: member names, keys, arrays as bytes.

``SPLIT-*.tar`` holds per sample ``moments.npy`` (2 x channels, height, width), the posterior's mean
above its log-variance, unscaled, and ``json`` {caption, text}; ``texts-*.tar`` holds per distinct
caption ``states.npy`` (tokens, width) and ``ids.npy`` (tokens,) under the key that ``text`` names.
Samples differ in height and width where the pictures have aspect buckets; the manifest then has
``image_size``, the side of the square one. Where it has ``flip``, training samples have
``mirrored.npy`` too: the moments of the picture with left and right exchanged.
"""

from __future__ import annotations

import hashlib
import io
import json
from functools import lru_cache

import numpy as np

from ldm.artifacts import Manifest
from ldm.shards import ShardReader

MOMENTS, MIRRORED, ABOUT = "moments.npy", "mirrored.npy", "json"
STATES, IDS = "states.npy", "ids.npy"
TEXT_MEMBERS = frozenset({STATES, IDS})
TEXTS = "texts"
HEADER_BYTES = 256
"""Of a ``.npy`` file, at most: numpy pads what an array of three dimensions needs to 128."""


def arrays_of(split: str, *, flip: bool) -> tuple[str, ...]:
    """The arrays of a split's samples. What is validated on is not encoded mirrored."""
    return (MOMENTS, MIRRORED) if flip and split == "train" else (MOMENTS,)


class SampleReader(ShardReader):
    """Random access to the samples of a split of a latents artifact; ``arrays``: what they have."""

    def __init__(self, latents: Manifest, split: str) -> None:
        self.arrays = arrays_of(split, flip=latents.config.get("flip", False))
        super().__init__(latents.path, split, frozenset({*self.arrays, ABOUT}))

    def caption(self, key: str) -> str:
        """In the words of its row."""
        return str(json.loads(self.read(key, ABOUT))["caption"])


def text_key(caption: str) -> str:
    """The key of a caption's states: half of its sha256."""
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def to_npy(values: np.ndarray) -> bytes:
    """An array as the bytes of a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def from_npy(content: bytes) -> np.ndarray:
    """The array in the bytes of a ``.npy`` file, read-only; equal headers are parsed once."""
    size = _header_size(content)
    shape, dtype = _header(content[:size])
    return np.frombuffer(content, dtype, offset=size).reshape(shape)


def npy_header(start: bytes) -> tuple[bytes, tuple[int, ...], np.dtype]:
    """Header, and by it shape and dtype, of a ``.npy`` file; ``HEADER_BYTES`` of it are enough."""
    size = _header_size(start)
    assert size <= len(start), size
    return start[:size], *_header(start[:size])


def _header_size(content: bytes) -> int:
    return 10 + int.from_bytes(content[8:10], "little")


@lru_cache(maxsize=64)
def _header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    assert version == (1, 0), version
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    assert not fortran_order and not dtype.hasobject
    return shape, dtype
