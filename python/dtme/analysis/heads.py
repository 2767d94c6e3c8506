"""The losses with the labels of other images, which tell whether the heads have learnt anything.

Rates of untrained heads are those of one random draw of heads, and are about the same whatever the labels are. No rate
shows that, and no resampling of batches does; the losses do, of each task by itself.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..trees import map_tensors

HEAD_BATCHES = 32
"""Of each process: those whose losses are also taken with the labels of other images."""


def labels_of_others(target: Any) -> Any:
    """The labels of a batch of two images at least, each of which gets those of the one half a batch before it.

    Neighbours are often alike, as frames of a film are, where nothing shuffles them.
    """
    return map_tensors(lambda leaf: leaf.roll(len(leaf) // 2, 0), target)


class HeadLosses:
    """The losses of the first batches, with the images' own labels and with those of others."""

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        self.rows: list[Tensor] = []
        """(K, 2) float64 of a batch: own, others'; NaN where a task had none."""

    def add(self, index: Sequence[int], own: Tensor, swapped: Tensor) -> None:
        """Those of the tasks ``index`` in one batch, which may be all NaN."""
        if len(self.rows) < HEAD_BATCHES and bool(swapped.isfinite().any()):
            row = torch.full((self.num_tasks, 2), math.nan, dtype=torch.float64)
            row[list(index)] = torch.stack([own, swapped], 1)
            self.rows.append(row)
