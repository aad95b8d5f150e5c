"""Cached latents to training batches, each a pure function of the seed and a step number.

A run consumes *positions* 0, 1, 2, ...: which sample a position shows, :mod:`ldm.train.order` says.
Posterior sample, noise, timestep, caption dropout and which way round it is shown come from a
counter-based generator keyed by (seed, position). Worker, rank, batch split and process state play
no part, so a run resumes from one integer.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.cache import LatentCache
from ldm.errors import UserError
from ldm.termination import ignore
from ldm.train.draws import DROPOUT, FLIPS, TIMESTEPS, TRAIN, VALIDATION, counter_based
from ldm.train.order import Order, by_shape

Item = TypeVar("Item")
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
        return self.at(self.positions(micro_batch))

    def own_seed(self, micro_batch: int) -> int:
        """For what a network draws by itself on this process's batch, as dropout does."""
        rng = counter_based(self.seed, DROPOUT, self.positions(micro_batch).start)
        return int(rng.integers(2**63))

    def positions(self, micro_batch: int) -> range:
        """This process's of a micro-batch."""
        first = micro_batch * self.batch_size + self.rank * self.share
        return range(first, first + self.share)

    def at(self, positions: range) -> Batch:
        """The batch of these positions. All are asked of the disk before one is waited for."""
        samples = [self.order.sample(position) for position in positions]
        mirrored = self.mirrored(positions)
        self.cache.expect(samples, mirrored)
        rngs = [counter_based(self.seed, TRAIN, position) for position in positions]
        latents, noise = _drawn(self.cache, samples, rngs, mirrored)
        dropped = [rng.random() < self.caption_dropout for rng in rngs]
        if self.offset_noise:
            noise += np.float32(self.offset_noise) * _normal(rngs, (noise.shape[1], 1, 1))
        shares = (shifted(spread_share(self.seed, at), self.timestep_shift) for at in positions)
        timesteps = [int(share * self.timesteps) for share in shares]
        return _batch(latents, noise, self.cache.texts(samples, dropped), timesteps)

    def mirrored(self, positions: range) -> list[bool] | None:
        """Which of these positions show the mirror image: each by even chance, if there are any."""
        if not self.cache.has_mirrored:
            return None
        return [counter_based(self.seed, FLIPS, at).random() < 0.5 for at in positions]

    def keys(self, step: int) -> list[str]:
        """Keys of the samples of an optimizer step, by process, then micro-batch, then place."""
        places = np.arange(self.accumulation * self.batch_size)
        by_process = places.reshape(self.accumulation, self.processes, self.share).swapaxes(0, 1)
        # Of its own: a thread asks the other one meanwhile, for the next batch.
        order, first = Order(self.cache.shapes, self.seed, len(places)), step * len(places)
        return [self.cache.key(order.sample(first + int(at))) for at in by_process.flat]


def made_ahead(
    batches: TrainingBatches, numbers: range, workers: int, *, pinned: bool, patience_s: int
) -> Generator[Batch]:
    """The micro-batches of these numbers, made ahead by so many processes, or else by a thread.

    These end when this is closed. ``pinned``: in memory that a GPU copies from. RuntimeError when a
    process makes none for ``patience_s``.
    """
    loader = DataLoader(
        _Told(batches) if workers else batches,
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        pin_memory=pinned,
        timeout=patience_s if workers else 0,
        worker_init_fn=ignore,
    )
    coming = iter(loader)
    if not workers:
        yield from one_ahead(coming)
        return
    try:
        for batch in coming:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        # Python ends them by SIGTERM, which they leave to us, and would wait for them for ever.
        coming._shutdown_workers()  # type: ignore[attr-defined]
        for process in coming._workers:  # type: ignore[attr-defined]
            process.kill()  # One that stands still.
            process.join()


class _Told(Dataset[Batch | Exception]):
    """Batches by a process of their own, or what was wrong outside the code.

    Raised there, that would come as a text of torch's, with a trace and without its number.
    """

    def __init__(self, batches: TrainingBatches) -> None:
        self.batches = batches

    def __getitem__(self, micro_batch: int) -> Batch | Exception:
        try:
            return self.batches[micro_batch]
        except (UserError, OSError) as error:
            return error


def one_ahead(batches: Iterator[Item]) -> Iterator[Item]:
    """The same batches, the next one made by a thread while this one is used."""
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
    """Every sample ``draws`` times, always the same; none dropped or mirrored.

    Each of a sample's timesteps is in another of ``draws`` equal parts of them, where the samples
    are spread evenly. A batch is of one shape; draw ``d`` of sample ``s`` is position
    ``d * len(cache) + s``. Yields this process's share of each batch, and how many samples that
    has: the shares in the order of ranks are the batch, and more of its last sample where it takes
    that to make them equal.
    """

    def batch(positions: Sequence[int]) -> Batch:
        samples = [position % len(cache) for position in positions]
        rngs = [counter_based(seed, VALIDATION, position) for position in positions]
        shown = [timestep(position) for position in positions]
        return _batch(*_drawn(cache, samples, rngs), cache.texts(samples), shown)

    def timestep(position: int) -> int:
        draw, sample = divmod(position, len(cache))
        # Rounded up: part p begins with the first timestep t for which t * draws // timesteps is p.
        low, high = (-(-part * timesteps // draws) for part in (draw, draw + 1))
        return min(low + int(spread_share(seed, sample) * (high - low)), timesteps - 1)

    firsts = len(cache) * np.arange(draws)[:, None]
    for samples in by_shape(cache.shapes):
        positions = (firsts + samples).ravel()
        for start in range(0, len(positions), batch_size):
            whole = positions[start : start + batch_size]
            share = -(-len(whole) // processes)
            own = np.minimum(rank * share + np.arange(share), len(whole) - 1)
            yield batch(whole[own].tolist()), len(whole)


def _drawn(
    cache: LatentCache,
    samples: Sequence[int],
    rngs: Sequence[np.random.Generator],
    mirrored: Sequence[bool] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Latents and noise of samples of one shape, each by its own generator."""
    shape = cache.latent_shape(samples[0])
    latents = cache.latents(samples, _normal(rngs, shape), mirrored)
    return latents, _normal(rngs, shape)


def _normal(rngs: Sequence[np.random.Generator], shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 (n, *shape), each row by its own generator."""
    rows = np.empty((len(rngs), *shape), np.float32)
    for rng, row in zip(rngs, rows, strict=True):
        rng.standard_normal(out=row, dtype=np.float32)
    return rows


def _batch(
    latents: np.ndarray, noise: np.ndarray, texts: np.ndarray, timesteps: Sequence[int]
) -> Batch:
    texts = texts if texts.dtype == np.int64 else texts.astype(np.float32, copy=False)
    return Batch(
        torch.from_numpy(latents),
        torch.from_numpy(noise),
        torch.from_numpy(texts),
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
