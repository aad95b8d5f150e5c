"""Hard negatives for CLIP: captions of the same words that say something else.

Among random captions a bag of words is enough to find the right one, and CLIP learns no more
(arXiv:2210.01936): "a red circle left of a blue square" and "a blue circle left of a red square"
get nearly the same states, and a UNet that reads them cannot know which is where. Captions with
exchanged words teach the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
import torch

Ids = tuple[int, ...]


class Rearranger:
    """Exchanges words of a caption where the result reads like another caption.

    It does so if every two neighbouring tokens of it are neighbours somewhere in ``captions``:
    int64 ids (n, tokens), padded as :func:`ldm.text.tokenize` pads them.
    """

    def __init__(self, captions: torch.Tensor) -> None:
        self._neighbours = {pair for ids in captions.tolist() for pair in pairwise(ids)}
        self._known: dict[Ids, Sequence[Ids]] = {}

    def all_of(self, ids: torch.Tensor) -> torch.Tensor:
        """What one exchange, and one after another, makes of a caption (tokens,): (n, tokens)."""
        found = self._rearranged(tuple(ids.tolist()))
        return torch.tensor(found, dtype=ids.dtype).reshape(-1, len(ids))

    def some_of_each(
        self, captions: torch.Tensor, most: int, rng: np.random.Generator
    ) -> torch.Tensor:
        """``most`` random ones of each caption, or all it has: ids (n * most at most, tokens)."""
        chosen: list[Ids] = []
        for ids in map(tuple, captions.tolist()):
            found = self._rearranged(ids)
            chosen.extend(found[at] for at in rng.permutation(len(found))[:most])
        return torch.tensor(chosen, dtype=captions.dtype).reshape(-1, captions.shape[1])

    def _rearranged(self, ids: Ids) -> Sequence[Ids]:
        if ids not in self._known:
            once = set(self._exchanged(ids))
            twice = {found for one in once for found in self._exchanged(one)}
            self._known[ids] = sorted((once | twice) - {ids})
        return self._known[ids]

    def _exchanged(self, ids: Ids) -> Iterator[Ids]:
        """By one exchange; start, end and padding (the end again) stay where they are."""
        length = ids.index(ids[-1])
        for i, j in combinations(range(1, length), 2):
            if ids[i] != ids[j]:
                found = list(ids)
                found[i], found[j] = found[j], found[i]
                touched = {i - 1, i, j - 1, j}
                if all((found[at], found[at + 1]) in self._neighbours for at in touched):
                    yield tuple(found)


def told_apart(
    captions: torch.Tensor, scores: Callable[[int, torch.Tensor], torch.Tensor]
) -> float | None:
    """Share of captions (n, tokens) that score above all their rearrangements.

    ``scores(number, said)``: how well each of ``said`` (m, tokens) fits picture ``number``, (m,).
    Of those that have any, None where none has.
    """
    rearranged = Rearranger(captions)
    right = []
    for number, ids in enumerate(captions):
        wrong = rearranged.all_of(ids)
        if len(wrong):
            right.append(bool(scores(number, torch.cat([ids[None], wrong])).argmax() == 0))
    return round(float(np.mean(right)), 4) if right else None
