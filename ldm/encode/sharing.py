"""How several processes share out work: each unit goes to one of them, counts are summed.

They speak through the key-value store that ``accelerate launch`` keeps for the processes it starts
(``torch.distributed``'s). A process alone has a store of its own, so that the work is written once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed import HashStore, Store, rendezvous  # type: ignore[attr-defined]

Unit = TypeVar("Unit")

PATIENCE = timedelta(days=1000)
"""The launcher ends all processes when one of them ends early; no other sign is needed."""


class Sharing:
    """One process's part in the work of several."""

    def __init__(self, store: Store, rank: int, processes: int, local_rank: int) -> None:
        self.rank, self.processes, self.local_rank = rank, processes, local_rank
        self._store = store
        store.set_timeout(PATIENCE)

    @classmethod
    def alone(cls) -> Sharing:
        """All of the work in this process."""
        return cls(HashStore(), 0, 1, 0)

    @classmethod
    def launched(cls) -> Sharing:
        """This process's part, in one that ``accelerate launch`` or ``torchrun`` started.

        All of the work in one that was started alone, which has no number among others.
        """
        if "RANK" not in os.environ:
            return cls.alone()
        store, rank, processes = next(rendezvous("env://"))
        return cls(store, rank, processes, int(os.environ["LOCAL_RANK"]))

    @property
    def is_main(self) -> bool:
        """Whether this process says what there is to do."""
        return self.rank == 0

    def device(self, found: torch.device) -> torch.device:
        """This process's own of the devices of that kind."""
        return torch.device("cuda", self.local_rank) if found.type == "cuda" else found

    def tell(self, what: str, value: str) -> None:
        """Say something to the other processes."""
        self._store.set(what, value)

    def hear(self, what: str) -> str:
        """What a process told; waits until one does."""
        return self._store.get(what).decode()

    def each(self, what: str, units: Sequence[Unit]) -> Iterator[Unit]:
        """The units of this process; each of them, in order, goes to the process that asks next.

        All processes give the same ``units`` under the same name.
        """
        while (number := self._store.add(f"next of {what}", 1) - 1) < len(units):
            yield units[number]

    def add(self, what: str, number: int) -> int:
        """Add to a count that all processes share; what it is then."""
        return self._store.add(f"count of {what}", number)

    def count(self, what: str) -> int:
        """What all processes added up to."""
        return self.add(what, 0)

    def meet(self, where: str) -> None:
        """Wait until all processes are there."""
        if self.add(where, 1) == self.processes:
            self._store.set(f"all at {where}", "")
        self._store.wait([f"all at {where}"])
