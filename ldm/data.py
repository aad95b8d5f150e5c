"""Cached latents to training batches, each a pure function of the seed and a step number.

A run consumes *positions* 0, 1, 2, ...: which sample a position shows, :mod:`ldm.order` says.
Posterior sample, noise, timestep and caption dropout come from a counter-based generator keyed by
(seed, position). Worker, rank, batch split and process state play no part, so a run resumes from
one integer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.artifacts import Manifest, opening
from ldm.draws import TIMESTEPS, TRAIN, VALIDATION, counter_based
from ldm.latents import (
    ABOUT,
    HEADER_BYTES,
    MOMENTS,
    SAMPLE_MEMBERS,
    STATES,
    TEXT_MEMBERS,
    TEXTS,
    from_npy,
    npy_shape,
    text_key,
)
from ldm.order import Order, by_shape
from ldm.shards import ShardReader

Row = tuple[np.ndarray, np.ndarray, np.ndarray, int]
"""Latents, noise, text, timestep of one sample."""

GOLDEN = (math.sqrt(5) - 1) / 2
BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class Batch:
    """What a training step needs of n samples.

    Float32 latents and noise (n, c, h, w), scaled; texts as float32 states (n, tokens, width) or
    int64 token ids (n, tokens); int64 timesteps (n,).
    """

    latents: torch.Tensor
    noise: torch.Tensor
    texts: torch.Tensor
    timesteps: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = (getattr(self, field.name).to(device, non_blocking=True) for field in fields(self))
        return Batch(*moved)

    def pin_memory(self) -> Batch:
        """The same batch in memory from which a GPU copies beside its work; for the loader."""
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


class LatentCache:
    """One split of a latents artifact, by sample number.

    ``texts``: the captions' ``STATES``, or their ``IDS`` for a text encoder that is trained.
    """

    def __init__(self, folder: Path, split: str, texts: str = STATES) -> None:
        assert texts in TEXT_MEMBERS
        self._text_member = texts
        self.manifest: Manifest = opening(folder, "latents", "encode")
        self.split = split
        self.scaling_factor = float(self.manifest.config["scaling_factor"])
        self.shift_factor = float(self.manifest.config["shift_factor"])
        self._samples = ShardReader(folder, split, SAMPLE_MEMBERS)
        self._texts = ShardReader(folder, TEXTS, TEXT_MEMBERS)
        abouts = (json.loads(self._samples.read(key, ABOUT)) for key in self._samples)
        # An array of bytes, because a list of strings is three times as large.
        self._text_of = np.array([about["text"].encode() for about in abouts], np.bytes_)
        self._empty = text_key("")
        heads = (self._samples.read(key, MOMENTS, HEADER_BYTES) for key in self._samples)
        self.shapes = np.array([npy_shape(head) for head in heads])
        """Of the samples' moments, by number: integers (samples, 3)."""

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, sample: int) -> str:
        """The name of the sample in the shards, a hash of its URL; ``ldm trace`` tells which."""
        return self._samples.key(sample)

    def caption(self, sample: int) -> str:
        """In the words of its row."""
        return str(json.loads(self._samples.read(self.key(sample), ABOUT))["caption"])

    def moments(self, sample: int) -> np.ndarray:
        """Unscaled posterior mean above log-variance: (2 x channels, height, width)."""
        return from_npy(self._samples.read(self.key(sample), MOMENTS))

    def text(self, sample: int, *, dropped: bool = False) -> np.ndarray:
        """The sample's caption, or the empty one: states (tokens, width), or ids (tokens,)."""
        key = self._empty if dropped else self._text_of[sample].decode()
        return from_npy(self._texts.read(key, self._text_member))

    def expect(self, sample: int) -> None:
        """Have the system fetch the sample and its text from disk: they are read soon."""
        self._samples.expect(self.key(sample), MOMENTS)
        self._texts.expect(self._text_of[sample].decode(), self._text_member)

    def latents(self, sample: int, rng: np.random.Generator) -> np.ndarray:
        """A posterior sample, shifted and scaled to about unit variance: float32 (c, h, w)."""
        mean, log_variance = np.split(self.moments(sample).astype(np.float32), 2)
        spread = np.exp(0.5 * np.clip(log_variance, -30, 20))
        drawn = mean + spread * rng.standard_normal(mean.shape, dtype=np.float32)
        return (drawn - self.shift_factor) * self.scaling_factor


class TrainingBatches(Dataset[Batch]):
    """This process's share of every micro-batch of a run, by micro-batch number.

    ``batch_size`` samples over all processes are a micro-batch, ``accumulation`` of these a step;
    all samples of a step have one shape.
    """

    def __init__(
        self,
        cache: LatentCache,
        *,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        timesteps: int,
        timestep_shift: float = 1.0,
        offset_noise: float = 0.0,
        caption_dropout: float,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        assert batch_size % processes == 0
        self.cache, self.seed, self.batch_size = cache, seed, batch_size
        self.accumulation = accumulation
        self.order = Order(cache.shapes, seed, batch_size * accumulation)
        self.timesteps, self.timestep_shift = timesteps, timestep_shift
        self.offset_noise, self.caption_dropout = offset_noise, caption_dropout
        self.rank, self.processes, self.share = rank, processes, batch_size // processes

    def __getitem__(self, micro_batch: int) -> Batch:
        first = micro_batch * self.batch_size + self.rank * self.share
        return self.at(range(first, first + self.share))

    def at(self, positions: range) -> Batch:
        """The batch of these positions. All are asked of the disk before one is waited for."""
        shown = [(position, self.order.sample(position)) for position in positions]
        for _, sample in shown:
            self.cache.expect(sample)
        return _stack([self._row(position, sample) for position, sample in shown])

    def keys(self, step: int) -> list[str]:
        """Keys of the samples of an optimizer step, by process, then micro-batch, then place."""
        places = np.arange(self.accumulation * self.batch_size)
        by_process = places.reshape(self.accumulation, self.processes, self.share).swapaxes(0, 1)
        first = step * len(places)
        return [self.cache.key(self.order.sample(first + int(at))) for at in by_process.flat]

    def _row(self, position: int, sample: int) -> Row:
        rng = counter_based(self.seed, TRAIN, position)
        latents = self.cache.latents(sample, rng)
        noise = rng.standard_normal(latents.shape, dtype=np.float32)
        text = self.cache.text(sample, dropped=bool(rng.random() < self.caption_dropout))
        share = shifted(spread_share(self.seed, position), self.timestep_shift)
        if self.offset_noise:
            channels = rng.standard_normal((len(noise), 1, 1), dtype=np.float32)
            noise += np.float32(self.offset_noise) * channels
        return latents, noise, text, int(share * self.timesteps)


def one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, the next one made by a thread while this one is trained on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def validation_batches(
    cache: LatentCache,
    *,
    seed: int,
    batch_size: int,
    timesteps: int,
    draws: int = 4,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[tuple[Batch, int]]:
    """Every sample ``draws`` times at spread timesteps, always the same ones; nothing dropped.

    A batch is of one shape; draw ``d`` of sample ``s`` is position ``d * len(cache) + s``. Yields
    this process's share of each batch, and how many samples that has: the shares in the order of
    ranks are the batch, and more of its last sample where it takes that to make them equal.
    """

    def row(position: int) -> Row:
        sample = position % len(cache)
        rng = counter_based(seed, VALIDATION, position)
        latents = cache.latents(sample, rng)
        noise = rng.standard_normal(latents.shape, dtype=np.float32)
        timestep = int(spread_share(seed, position) * timesteps)
        return latents, noise, cache.text(sample), timestep

    firsts = len(cache) * np.arange(draws)[:, None]
    for samples in by_shape(cache.shapes):
        positions = (firsts + samples).ravel()
        for start in range(0, len(positions), batch_size):
            whole = positions[start : start + batch_size]
            share = -(-len(whole) // processes)
            own = np.minimum(rank * share + np.arange(share), len(whole) - 1)
            yield _stack([row(int(at)) for at in whole[own]]), len(whole)


def _stack(rows: list[Row]) -> Batch:
    latents, noise, texts, timesteps = zip(*rows, strict=True)
    stacked = np.stack(texts)
    return Batch(
        torch.from_numpy(np.stack(latents)),
        torch.from_numpy(np.stack(noise)),
        torch.from_numpy(stacked if stacked.dtype == np.int64 else stacked.astype(np.float32)),
        torch.tensor(timesteps),
    )


def spread_share(seed: int, position: int) -> float:
    """Which share of the timesteps a position shows: in [0, 1), uniform over positions.

    Multiples of the golden ratio modulo 1 from a random start: any run of positions covers the
    range more evenly than independent draws, which lowers the variance of a batch's loss.
    """
    return float((_first_share(seed) + position * GOLDEN) % 1.0)


@lru_cache(maxsize=2)
def _first_share(seed: int) -> float:
    return float(counter_based(seed, TIMESTEPS, 0).random())


def shifted(share: float, shift: float) -> float:
    """A share in [0, 1), moved towards the noisy end by a ``shift`` above 1.

    Stable Diffusion 3 (arXiv:2403.03206, section 5.3.2) shifts so for larger pictures. With shift 4
    the noisiest timesteps are shown four times as often, the least noisy a quarter as often.
    """
    return min(shift * share / (1 + (shift - 1) * share), BELOW_ONE)
