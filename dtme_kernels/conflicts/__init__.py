"""Conflicts between task gradients in the range and in the null space of the tokens (Eq. 4)."""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from ..checks import check_tensors
from . import op
from .counts import ConflictCounts

__all__ = ["ConflictCounts", "count_conflicts", "projected_dots"]


def count_conflicts(
    grads: Tensor,
    basis: Tensor,
    rank: int | Sequence[int],
    *,
    count_zero_gradients: bool = False,
    impl: str = "auto",
) -> ConflictCounts:
    """Count, for every pair of tasks, the tokens at which their gradients conflict in each space (Eq. 4).

    With ``h_i = U^T g_i``, i and j conflict in the range space where ``sum_{c < m} h_i[c] h_j[c] <= 0`` and in the null
    space where the sum over ``c >= m`` is. A (token, pair) is valid where both gradients have a non-zero entry and
    neither a NaN or Inf. Dots are taken in float32 (float64 for float64), matrix products as exact as
    ``torch.get_float32_matmul_precision()`` says, of gradients scaled to about 1: their
    magnitude neither over- nor underflows. In a basis with NaN or Inf no pair is valid.

    The kernels rotate into the smaller of the two spaces, and into both only where a sign is not certain otherwise; in
    Triton (``kernel.py`` says how) in one pass of the tensor cores where gradients and basis are both float16 or both
    bfloat16, two for such gradients in a wider basis, three for float32 gradients (one where the precision is not
    "highest"). One pass rotates into both spaces always. A basis rounded to bfloat16 loses the null space where the
    range is a hundred times stronger.

    The Triton kernels keep a basis, split, for the next call. Torch's version counter tells them when it was written
    to, as it tells autograd; neither is told of writes through ``basis.data``.

    Args:
        grads: (K, ..., p), K >= 2 tasks, floating point, any strides. No token at all is fine.
        basis: (p, p), eigenvectors as columns, leading ones first. Any floating dtype.
        rank: m, in [1, p-1]; or R of them, for the price of one rotation.
        count_zero_gradients: let zero gradients be valid, and so conflict with every task, as Algorithm 1 is written.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` (16 tasks, not float64) or ``"cpp"``.

    Returns:
        ``ConflictCounts`` on the device of ``grads``; of several ranks, with a leading axis: ``counts[r]`` are those of
        ``rank[r]``. Nothing waits for the device.

    Raises:
        TypeError: a tensor is not a floating-point tensor, ``rank`` is not an integer or a sequence of them.
        ValueError: a shape or device does not match, K < 2, there is no rank or one out of range; ``impl`` is unknown.
        RuntimeError: the named ``impl`` cannot run here; the message says why.
    """
    check_tensors(grads=grads, basis=basis)
    if isinstance(rank, Sequence) or (isinstance(rank, Tensor) and rank.dim() > 0):
        ranks = [_integer(f"rank[{r}]", m) for r, m in enumerate(rank)]
    else:
        ranks = [_integer("rank", rank)]
        rank = ranks[0]
    increasing = sorted(set(ranks))
    range_, null, valid, nonfinite = op.count_conflicts(impl, grads, basis, increasing, bool(count_zero_gradients))
    num_tokens = grads.shape[1:-1].numel()
    if isinstance(rank, int):
        return ConflictCounts(range_[0], null[0], valid, num_tokens, nonfinite)
    range_, null = (torch.stack([x[increasing.index(m)] for m in ranks]) for x in (range_, null))
    return ConflictCounts(range_, null, valid.expand_as(range_), num_tokens, nonfinite)


def projected_dots(grads: Tensor, basis: Tensor, rank: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Return the dot products of task gradients in the range and in the null space, token by token (Eq. 4).

    ``sum_{c < m} h_i[c] h_j[c]`` and ``sum_{c >= m} h_i[c] h_j[c]`` with ``h_i = U^T g_i``, for the pairs i < j in the
    order of ``itertools.combinations(range(K), 2)``.

    Args:
        grads: (K, ..., p), K >= 2 tasks, floating point, any strides.
        basis: (p, p), eigenvectors as columns, leading ones first. Any floating dtype.
        rank: m, in [1, p-1].
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cpp"``.

    Returns:
        Range and null dots, each (P, ...) with P = K(K-1)/2; float32 for float32 ``grads`` and lower precision, float64
        for float64. Differentiable, once, in ``grads`` and ``basis``.

    Raises:
        As ``count_conflicts``.
    """
    check_tensors(grads=grads, basis=basis)
    return op.projected_dots(impl, grads, basis, _integer("rank", rank))


def _integer(name: str, rank: object) -> int:
    if not isinstance(rank, int) and hasattr(rank, "__index__"):  # an entry of TokenSpace.rank, a NumPy integer
        rank = index(rank)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name} must be an int, got {rank!r}")
    if abs(rank) >= 2**63:  # no operator takes it
        raise ValueError(f"{name} must be in [1, p-1], got {rank}")
    return rank
