"""Notice a loss that only adds up others, such as the total that a training step returns beside its tasks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# elements of gradients looked at a time: 16 MB in float64 for two tasks
CHUNK = 2**20


class SumFinder:
    """Looks for a task whose gradient is, to rounding, a positive combination of at least two others'.

    If ``total = a + b``, then also ``a = total - b``: only positive combinations point at the sum. The decision comes
    from the Gram matrix of the gradients at one block, in float64. Where K gradients have hardly more than K entries
    that are free to differ, each is a combination of the others by necessity; how many there are is counted as the sum,
    over the images, of the rank that the gradients have in each.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self.gram = np.zeros((len(self.tasks), len(self.tasks)))
        self.freedom = 0

    def state(self) -> dict[str, Any]:
        return {"gram": self.gram.tolist(), "freedom": self.freedom}

    def load(self, state: dict[str, Any]) -> None:
        self.gram, self.freedom = np.array(state["gram"]), state["freedom"]

    def add(self, gradients: Tensor, dtype: torch.dtype) -> tuple[str, tuple[str, ...]] | None:
        """Add a batch.

        Args:
            gradients: (K, B, ..., p), finite.
            dtype: the lowest precision in which they were computed.

        Returns:
            The task that is a sum, and those it sums; None if there is none, or too little was seen to tell.
        """
        tolerance = max(torch.finfo(dtype).eps ** 0.5 / 2, 1e-6)  # a sum has half of the digits right, others none
        grams = _grams(gradients)
        self.gram += grams.sum(0)
        if self.freedom < 2 * len(self.tasks):
            self.freedom += sum(len(_independent(gram, tolerance)[0]) for gram in grams)
        found = _independent(self.gram, tolerance)[1]
        if found is None or self.freedom < 2 * len(self.tasks):
            return None
        return self.tasks[found[0]], tuple(self.tasks[j] for j in found[1])


def _grams(gradients: Tensor) -> np.ndarray:
    """(K, B, ..., p) → (B, K, K) float64, one of each image."""
    rows = gradients.flatten(2).transpose(0, 1)
    parts = [part.double() for part in rows.split(max(1, CHUNK // max(1, rows[:1].numel())))]
    return torch.cat([part @ part.mT for part in parts]).cpu().numpy()


def _independent(gram: np.ndarray, tolerance: float) -> tuple[list[int], tuple[int, list[int]] | None]:
    """The largest set of well-conditioned gradients in the order given, and the first sum: what it is, and of what.

    One gradient after the other joins the set. One that depends on those in it gives a null vector, whose entries say
    how: parallel gradients have one of each sign, a sum has one against at least two.
    """
    norms = np.sqrt(gram.diagonal())
    chosen: list[int] = []
    for i in np.flatnonzero(norms):
        some = [*chosen, int(i)]
        values, vectors = np.linalg.eigh(gram[np.ix_(some, some)] / np.outer(norms[some], norms[some]))
        if values[0] > (4 * tolerance) ** 2:
            chosen = some
        elif values[0] <= tolerance**2:
            weights = vectors[:, 0]
            up, down = ([some[j] for j in np.flatnonzero(sign * weights > 4 * tolerance)] for sign in (1, -1))
            for one, many in ((up, down), (down, up)):
                if len(one) == 1 and len(many) > 1:
                    return chosen, (one[0], many)
    return chosen, None
