"""Computing items in batches so that each result is a function of its item alone.

The last bits of a result depend on the shape of its batch and, on a CPU, on how threads share that:
of 63 pictures on two threads, each place gives others. So every batch is of items of one shape and
full, if need be filled up with copies, and of several computed at a time each has one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from typing import TypeVar

import numpy as np
import torch

Item = TypeVar("Item")


def in_full_batches(
    run: Callable[[list[Item]], np.ndarray],
    items: Iterable[Item],
    size: int,
    at_a_time: int,
    shape: Callable[[Item], Hashable] = lambda _: None,
) -> Iterator[np.ndarray]:
    """Each item's result by ``run``, in order; twice ``at_a_time`` batches of ``size`` are held.

    Half of these are computed while what is made of the others' results is dealt with.
    ``run`` turns ``size`` items into an array (size, ...). A lone batch has all threads of torch.
    Where the items' ``shape`` changes, a new batch begins; by default all have the same.
    """

    def full(batch: list[Item]) -> np.ndarray:
        return run(batch + [batch[-1]] * (size - len(batch)))[: len(batch)]

    threads = torch.get_num_threads()
    # Each thread starts at the first GPU; here may be another process's.
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def begin() -> None:
        torch.set_num_threads(threads if at_a_time == 1 else 1)
        if gpu is not None:
            torch.cuda.set_device(gpu)

    pool = ThreadPoolExecutor(at_a_time, "batch", begin)
    try:
        with pool:
            running: deque[Future[np.ndarray]] = deque()
            for batch in alike(items, size, shape):
                running.append(pool.submit(full, batch))
                if len(running) == 2 * at_a_time:
                    yield from running.popleft().result()
            for last in running:
                yield from last.result()
    finally:
        torch.set_num_threads(threads)  # What a worker sets is in part the whole process's.


def alike(
    items: Iterable[Item], size: int, shape: Callable[[Item], Hashable]
) -> Iterator[list[Item]]:
    """Cut into lists of at most ``size`` items of equal shape."""
    for _, same in groupby(items, shape):
        yield from parts(same, size)


def parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Cut into lists of ``size``, the last one maybe shorter."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
