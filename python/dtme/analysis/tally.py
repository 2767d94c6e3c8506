"""What the second pass adds up: conflict counts, bundle by bundle of batches, in memory that stays bounded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..units import Units

MOST_UNITS = 256
MOST_COUNTS = 2**22
"""Counts kept for each space and ratio: with many pairs of tasks, there are fewer and larger units."""
LEAST_UNITS = 16


class Bundles:
    """Sums over batches that were read one after the other; when there are too many, neighbours are joined.

    Args:
        most: how many there may be.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.sums: list[Tensor] = []
        self.batches: list[int] = []
        self.size = 1
        """Batches in each, but the last, which may still have fewer."""

    def add(self, values: Tensor) -> None:
        """One batch."""
        if self.batches and self.batches[-1] < self.size:
            self.sums[-1] = self.sums[-1] + values
            self.batches[-1] += 1
            return
        if len(self.sums) == self.most:
            self.sums = [a + b for a, b in zip(self.sums[::2], self.sums[1::2], strict=True)]
            self.batches = [a + b for a, b in zip(self.batches[::2], self.batches[1::2], strict=True)]
            self.size *= 2
        self.sums.append(values)
        self.batches.append(1)

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "batches": self.batches, "size": self.size}

    def load(self, state: dict[str, Any]) -> None:
        self.sums, self.batches, self.size = list(state["sums"]), list(state["batches"]), state["size"]


class Tally:
    """Conflicts of D blocks, K tasks and R ratios.

    The sums of a batch are (2 R + 1, D, P): range of every ratio, null of every ratio, and valid, for the pairs of
    tasks in the order of ``itertools.combinations(range(K), 2)``.
    """

    def __init__(self, num_blocks: int, num_tasks: int, num_ratios: int) -> None:
        self.num_ratios = num_ratios
        self.pairs = torch.triu_indices(num_tasks, num_tasks, 1)
        self.shape = (2 * num_ratios + 1, num_blocks, self.pairs.shape[1])
        self.bundles = Bundles(most_units(num_blocks * self.pairs.shape[1]))

    def add(self, range_: Tensor, null: Tensor, valid: Tensor) -> None:
        """Counts of one batch, (D, R, K, K), (D, R, K, K) and (D, K, K)."""
        i, j = self.pairs
        spaces = [x[..., i, j].transpose(0, 1) for x in (range_, null)]
        self.bundles.add(torch.cat([*spaces, valid[None, :, i, j]]))


def most_units(counts: int) -> int:
    """An even number of units, for so many counts in each."""
    return max(LEAST_UNITS, min(MOST_UNITS, MOST_COUNTS // max(counts, 1) // 2 * 2))


def units(sums: Sequence[Tensor], batches: Sequence[int], shape: Sequence[int], ratio: int) -> Units:
    """The units of one of the ratios."""
    stacked = torch.stack(list(sums)) if sums else torch.zeros(0, *shape, dtype=torch.int64)
    num_ratios = (shape[0] - 1) // 2
    return Units(stacked[:, ratio], stacked[:, num_ratios + ratio], stacked[:, -1], torch.tensor(batches))


def matrices(counts: Tensor, num_tasks: int) -> Tensor:
    """(..., P) → (..., K, K), symmetric with a zero diagonal."""
    i, j = torch.triu_indices(num_tasks, num_tasks, 1)
    full = counts.new_zeros(*counts.shape[:-1], num_tasks, num_tasks)
    full[..., i, j] = full[..., j, i] = counts
    return full
