"""The latents artifact as training reads it: many samples at a time, by number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.artifacts import Manifest, opening
from ldm.latents import (
    ABOUT,
    HEADER_BYTES,
    MIRRORED,
    MOMENTS,
    STATES,
    TEXT_MEMBERS,
    TEXTS,
    SampleReader,
    npy_header,
    text_key,
)
from ldm.shards import Numbers, ShardReader

LOG_VARIANCES = -30.0, 20.0
"""Least and greatest, as diffusers clips them."""


class LatentCache:
    """One split of a latents artifact, by sample number.

    ``latents``: its folder, or its manifest where that is verified. ``texts``: the captions'
    ``STATES``, or their ``IDS`` for a text encoder that is trained.
    """

    def __init__(self, latents: Path | Manifest, split: str, texts: str = STATES) -> None:
        assert texts in TEXT_MEMBERS
        self._text_member = texts
        if not isinstance(latents, Manifest):
            latents = opening(latents, "latents", "encode")
        self.manifest, self.split, folder = latents, split, latents.path
        self.scaling_factor = float(self.manifest.config["scaling_factor"])
        self.shift_factor = float(self.manifest.config["shift_factor"])
        self._samples = SampleReader(latents, split)
        self.has_mirrored = MIRRORED in self._samples.arrays
        self._texts = ShardReader(folder, TEXTS, TEXT_MEMBERS)
        abouts = (json.loads(self._samples.read(key, ABOUT)) for key in self._samples)
        self._text_of = self._texts.numbers(about["text"] for about in abouts)
        (self._empty,) = self._texts.numbers([text_key("")])
        heads = (self._samples.read(key, MOMENTS, HEADER_BYTES) for key in self._samples)
        self.shapes = np.array([npy_header(head)[1] for head in heads])
        """Of the samples' moments, by number: integers (samples, 3)."""

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, sample: int) -> str:
        """The name of the sample in the shards, a hash of its URL; ``ldm trace`` tells which."""
        return self._samples.key(sample)

    def caption(self, sample: int) -> str:
        """In the words of its row."""
        return self._samples.caption(self.key(sample))

    def expect(self, samples: Sequence[int], mirrored: Sequence[bool] | None = None) -> None:
        """Have the system fetch samples and their texts from disk: they are read soon."""
        for member, own in _by_member(samples, mirrored):
            self._samples.expect(np.asarray(samples)[own], member)
        self._texts.expect(self._text_of[samples], self._text_member)

    def moments(self, samples: Sequence[int], mirrored: Sequence[bool] | None = None) -> np.ndarray:
        """Unscaled posterior means above log-variances: (n, 2 x channels, height, width).

        Those of the picture's mirror image where it is ``mirrored``, which asks for a cache that
        ``has_mirrored`` ones.
        """
        parts = [
            (own, _arrays(self._samples, np.asarray(samples)[own], member))
            for member, own in _by_member(samples, mirrored)
        ]
        first = parts[0][1]
        if len(parts) == 1:
            return first
        moments = np.empty((len(samples), *first.shape[1:]), first.dtype)
        for own, arrays in parts:
            moments[own] = arrays
        return moments

    def texts(self, samples: Sequence[int], dropped: Sequence[bool] | None = None) -> np.ndarray:
        """Captions, the empty one where it is ``dropped``: (n, tokens, width) or (n, tokens)."""
        numbers = self._text_of[samples]
        if dropped is not None:
            numbers[dropped] = self._empty
        return _arrays(self._texts, numbers, self._text_member)

    def latents(
        self, samples: Sequence[int], noise: np.ndarray, mirrored: Sequence[bool] | None = None
    ) -> np.ndarray:
        """Posterior samples, shifted and scaled to about unit variance: float32 (n, c, h, w).

        ``noise`` is of that shape and standard normal; with zeros they are the means.
        """
        moments = self.moments(samples, mirrored).astype(np.float32)
        means, log_variances = np.split(moments, 2, axis=1)
        drawn = means + np.exp(0.5 * np.clip(log_variances, *LOG_VARIANCES)) * noise
        return (drawn - self.shift_factor) * self.scaling_factor

    def latent_shape(self, sample: int) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.shapes[sample].tolist()
        return channels // 2, height, width


def _by_member(
    samples: Sequence[int], mirrored: Sequence[bool] | None
) -> list[tuple[str, np.ndarray]]:
    """The members to read, each with where among the samples it is shown: bool (n,)."""
    turned = np.zeros(len(samples), bool) if mirrored is None else np.asarray(mirrored, bool)
    shown = ((MOMENTS, ~turned), (MIRRORED, turned))
    return [(member, own) for member, own in shown if own.any()]


def _arrays(reader: ShardReader, numbers: Numbers, member: str) -> np.ndarray:
    """The arrays of these samples, which are all of one shape: (n, ...)."""
    first = reader.read(reader.key(numbers[0]), member, HEADER_BYTES)
    header, shape, dtype = npy_header(first)
    arrays = np.empty((len(numbers), *shape), dtype)
    reader.read_each(numbers, member, header, arrays)
    return arrays
