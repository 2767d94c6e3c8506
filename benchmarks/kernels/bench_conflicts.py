"""Pairwise conflicts of one block's task gradients in both spaces (Eq. 4)."""

from itertools import combinations

import pytest
import torch

from dtme_kernels import count_conflicts


def printed(grads, basis, rank):
    """Eq. 4 as printed: both projectors, both projections of every gradient, every pair's products."""
    spaces = basis[:, :rank], basis[:, rank:]
    counts = torch.zeros(2, len(grads), len(grads), dtype=torch.int64)
    for space, u in enumerate(spaces):
        projected = grads @ (u @ u.T)
        for i, j in combinations(range(len(grads)), 2):
            counts[space, i, j] = counts[space, j, i] = ((projected[i] * projected[j]).sum(-1) <= 0).sum()
    return counts


def ours(grads, basis, rank):
    counts = count_conflicts(grads, basis, rank)
    return torch.stack([counts.range, counts.null])


RIVALS = {"printed": printed, "ours": ours}


@pytest.mark.parametrize("name", RIVALS)
def test_conflicts(benchmark, shape, name):
    rival = RIVALS[name]
    grads = torch.randn(shape.tasks, shape.images * shape.tokens, shape.channels)
    basis = torch.linalg.qr(torch.randn(shape.channels, shape.channels)).Q
    rank = shape.channels // 3
    exact = printed(grads.double(), basis.double(), rank)
    # a dot product within rounding of zero may fall on either side
    assert (rival(grads, basis, rank) - exact).abs().max() <= 2
    benchmark(rival, grads, basis, rank)
