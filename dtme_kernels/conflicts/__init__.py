"""Conflicts between task gradients in the range and in the null space of the tokens (Eq. 4)."""

from operator import index

from torch import Tensor

from ..checks import check_shape, check_tensors
from . import op
from .counts import ConflictCounts

__all__ = ["ConflictCounts", "count_conflicts", "projected_dots"]


def count_conflicts(
    grads: Tensor, basis: Tensor, rank: int, *, count_zero_gradients: bool = False, impl: str = "auto"
) -> ConflictCounts:
    """Count, for every pair of tasks, the tokens at which their gradients conflict in each space (Eq. 4).

    With ``h_i = U^T g_i``, i and j conflict in the range space where ``sum_{c < m} h_i[c] h_j[c] <= 0`` and in the null
    space where the sum over ``c >= m`` is. A (token, pair) is valid where both gradients have a non-zero entry and
    neither a NaN or Inf. Dots are taken in float32 (float64 for float64), matrix products as exact as
    ``torch.get_float32_matmul_precision()`` says, of gradients scaled to about 1: their
    magnitude neither over- nor underflows. In a basis with NaN or Inf no pair is valid.

    Args:
        grads: (K, ..., p), K >= 2 tasks, floating point, any strides. No token at all is fine.
        basis: (p, p), eigenvectors as columns, leading ones first. Any floating dtype.
        rank: m, in [1, p-1].
        count_zero_gradients: let zero gradients be valid, and so conflict with every task, as Algorithm 1 is written.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cpp"``.

    Returns:
        ``ConflictCounts`` on the device of ``grads``. Nothing waits for the device.

    Raises:
        TypeError: a tensor is not a floating-point tensor, ``rank`` is not an integer.
        ValueError: a shape or device does not match, K < 2, ``rank`` is out of range; ``impl`` is unknown.
        RuntimeError: the named ``impl`` cannot run here; the message says why.
    """
    rank = _check(grads, basis, rank)
    counts = op.count_conflicts(impl, grads, basis, rank, bool(count_zero_gradients))
    range_, null, valid, nonfinite = counts
    return ConflictCounts(range_, null, valid, grads.shape[1:-1].numel(), nonfinite)


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
    return op.projected_dots(impl, grads, basis, _check(grads, basis, rank))


def _check(grads: Tensor, basis: Tensor, rank: int) -> int:
    check_tensors(grads=grads, basis=basis)
    if grads.dim() < 2 or grads.shape[0] < 2 or grads.shape[-1] < 2:
        raise ValueError(f"grads must be (K, ..., p) with K >= 2 and p >= 2, got {tuple(grads.shape)}")
    p = grads.shape[-1]
    check_shape("basis", basis, "(p, p)", (p, p))
    if not isinstance(rank, int) and hasattr(rank, "__index__"):  # an entry of TokenSpace.rank, a NumPy integer
        rank = index(rank)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int, got {rank!r}")
    if not 1 <= rank <= p - 1:
        raise ValueError(f"rank must be in [1, p-1] = [1, {p - 1}], got {rank}")
    return rank
