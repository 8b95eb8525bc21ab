"""The endless shuffled stream: which item stands at which position.

Every epoch is a permutation of all items and epochs follow each other without a gap. The whole
state is the position: it is what a checkpoint stores, and the *global sample index* that keys all
noise of a sample (`goku.random`).
"""

from __future__ import annotations

import torch

from goku.random import Purpose, bits


class ShuffledStream:
    """Maps stream positions to items; `num_items` items, shuffled anew in every epoch.

    The permutation of epoch e is the stable argsort of
    ``goku.random.bits(seed, e, num_items, Purpose.SHUFFLE)``: a function of (seed, e, num_items)
    alone, so every process that asks gets the same answer and nothing has to be saved.

    Raises ValueError when `num_items` is not a positive integer.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        if not isinstance(num_items, int) or isinstance(num_items, bool) or num_items < 1:
            raise ValueError(f"num_items must be an integer >= 1, got {num_items!r}")
        self.num_items = num_items
        self.seed = seed
        # Two epochs, because a step may straddle the boundary between them.
        self._permutations: dict[int, list[int]] = {}

    def epoch(self, position: int) -> int:
        """The epoch (from 0) that `position` (from 0) falls into."""
        return self._checked(position) // self.num_items

    def item(self, position: int) -> int:
        """The item, 0 <= item < num_items, at `position` (from 0, without an end)."""
        epoch, offset = divmod(self._checked(position), self.num_items)
        return self._permutation(epoch)[offset]

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._permutations:
            order = torch.argsort(
                bits(self.seed, epoch, self.num_items, Purpose.SHUFFLE), stable=True
            )
            if len(self._permutations) == 2:
                del self._permutations[next(iter(self._permutations))]
            self._permutations[epoch] = order.tolist()
        return self._permutations[epoch]

    @staticmethod
    def _checked(position: int) -> int:
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ValueError(f"position must be an integer >= 0, got {position!r}")
        return position
