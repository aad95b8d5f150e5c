"""The format of the images artifact, and reading it.

``SPLIT-NNNNN.tar``, or with aspect buckets ``SPLIT-WIDTHxHEIGHT-NNNNN.tar``, holds per sample the
picture, whose extension is the ``image_format`` of the manifest, and ``json`` {caption, ...}.
"""

from __future__ import annotations

import json

from ldm.artifacts import Manifest
from ldm.shards import ShardReader

SPLITS = ("train", "validation")
ABOUT = "json"


def split_of(shard: str) -> str:
    """The split that a shard of this name belongs to."""
    return shard.partition("-")[0]


class ImageReader(ShardReader):
    """Random access to an images artifact's samples: to those of a split, or of one shard."""

    def __init__(self, images: Manifest, shards: str) -> None:
        self._format: str = images.config["image_format"]
        super().__init__(images.path, shards, frozenset({self._format, ABOUT}))

    def picture(self, key: str) -> bytes:
        """A sample's picture, encoded."""
        return self.read(key, self._format)

    def caption(self, key: str) -> str:
        """In the words of its row."""
        return str(json.loads(self.read(key, ABOUT))["caption"])
