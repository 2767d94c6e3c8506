"""What each task would gain, to first order, from an affine map of its own instead of one for all, block by block.

Let all tasks share one affine map (W, b) of the tokens that enter a block, or have one each; at the identity, task i
has the gradient g_i = (Σ dL_i/dx ⊙ x, Σ dL_i/dx). A step of length ε then lowers the sum of the losses by ε ‖Σ g_i‖
where the map is shared and by ε Σ ‖g_i‖ where it is not. The gain is the difference, over the sum of the losses.

Norms of averages over few batches are mostly noise, and noise is always positive: so they are taken from products of
different bundles of batches only, whose noise is independent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..resampling import resample_weights
from .tally import Bundles

MOST_BUNDLES, LEAST_BUNDLES = 32, 8
MOST_KEPT = 2**24
"""Numbers in all bundles: with many tasks and channels, there are fewer and larger ones."""
RESAMPLES = 200
MOST_NUMBERS = 2**27
"""In the resampled gradients of one block: with many tasks, there are fewer resamples."""


def map_gradients(gradients: Tensor, tokens: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """(K, B, N, p) and the tokens of each task (B, N, p) → (K, 2 p) float64: gradients of W and b at the identity.

    Args:
        mask: (B, N) bool, the tokens that count.
    """
    rows = []
    for gradient, x in zip(gradients, tokens, strict=True):
        gradient, x = (y.flatten(0, 1) if mask is None else y[mask] for y in (gradient, x))
        gradient = gradient.float() if gradient.element_size() < 4 else gradient
        rows.append(torch.cat([(gradient * x).sum(0), gradient.sum(0)]))
    return torch.stack(rows).double()


class Gains:
    """Gradients of affine maps at D blocks, bundled: one (K, 2 p) for each block, the losses, and who was present."""

    def __init__(self, widths: Sequence[int], num_tasks: int) -> None:
        self.widths, self.num_tasks = list(widths), num_tasks
        most = MOST_KEPT // (num_tasks * (2 * sum(widths) + 2)) // 2 * 2
        self.bundles = Bundles(max(LEAST_BUNDLES, min(MOST_BUNDLES, most)))

    def add(self, gradients: Sequence[Tensor], present: Sequence[int], losses: Tensor) -> None:
        """One batch: (K', 2 p_d) of every block and K' losses, of the K' tasks that are present."""
        row = torch.zeros(self.num_tasks, 2 * sum(self.widths) + 2, dtype=torch.float64)
        if present:
            row[list(present)] = torch.cat(
                [torch.cat(list(gradients), 1).cpu(), losses.cpu()[:, None], torch.ones(len(present), 1)], 1
            ).double()
        self.bundles.add(row)


def estimate(sums: Sequence[Tensor], widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gains (D,), and resampled (R, D), from the sums of n bundles; NaN where there are fewer than two."""
    num_blocks = len(widths)
    if len(sums) < 2:
        return torch.full((num_blocks,), torch.nan, dtype=torch.float64), torch.empty(0, num_blocks).double()
    stacked = torch.stack(list(sums))  # (n, K, ...)
    n, num_tasks, _ = stacked.shape
    count = min(RESAMPLES, max(50, MOST_NUMBERS // (num_tasks * (2 * max(widths) + num_tasks))))
    weights = torch.cat([torch.ones(1, n, dtype=torch.float64), resample_weights(n, count)])
    *parts, losses, present = stacked.split([*(2 * p for p in widths), 1, 1], 2)
    losses, present = losses[..., 0], present[..., 0]
    mean_loss = ((weights @ losses) / (weights @ present)).nan_to_num(0.0).abs().sum(1)
    together = _products(weights, present[..., None])
    # a pair of tasks that never met adds nothing
    grams = (torch.where(together > 0, _products(weights, part) / together, 0.0) for part in parts)
    found = torch.stack([_gain(gram) for gram in grams], 1) / mean_loss[:, None]
    return found[0], found[1:]


def _products(weights: Tensor, rows: Tensor) -> Tensor:
    """(R, n) and (n, K, q) → (R, K, K): Σ over different bundles a and b of w_a w_b ⟨row_i of a, row_j of b⟩."""
    sums = torch.einsum("rn,nkq->rkq", weights, rows)
    own = (rows @ rows.mT).flatten(1)
    return sums @ sums.mT - (weights.square() @ own).view(len(weights), *sums.shape[1:2] * 2)


def _gain(gram: Tensor) -> Tensor:
    """(..., K, K) of inner products of the tasks' mean gradients → (...)."""
    return _root(gram.diagonal(dim1=-2, dim2=-1)).sum(-1) - _root(gram.sum((-2, -1)))


def _root(square: Tensor) -> Tensor:
    """Of an estimate that may be below zero: noise then lowers as often as it raises."""
    return square.sign() * square.abs().sqrt()
