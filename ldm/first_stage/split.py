"""The pictures and captions that the first stage learns from, or is measured on."""

from __future__ import annotations

import numpy as np

from ldm.artifacts import Manifest
from ldm.image_shards import ImageReader
from ldm.images import decode_image


class Split:
    """A split of an images artifact: ``keys``, ``captions``, and pictures by their numbers."""

    def __init__(self, images: Manifest, split: str) -> None:
        self._reader = ImageReader(images, split)
        self.keys = self._reader.keys
        self.captions = [self._reader.caption(key) for key in self.keys]

    def __len__(self) -> int:
        return len(self.captions)

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, 3)."""
        files = (self._reader.picture(self.keys[number]) for number in numbers)
        return np.stack([decode_image(file) for file in files])
