"""The definition. Everything else is measured against it."""

from collections.abc import Sequence

import torch
from torch import Tensor

# elements of gradients rotated at a time: 4 MB in float32
CHUNK = 2**20


def count_conflicts(
    grads: Tensor, basis: Tensor, rank: Sequence[int], count_zero_gradients: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How many tokens have <U_R^T g_i, U_R^T g_j> <= 0, the same of U_N (Eq. 4), are valid; pairs not finite.

    The first two for every rank, (R, K, K).
    """
    num_tasks, p = grads.shape[0], grads.shape[-1]
    wide = torch.promote_types(grads.dtype, torch.float32)
    grads, basis = grads.detach(), basis.detach().to(wide)
    usable = basis.isfinite().all()  # no pair can be compared in a basis of NaN
    first, second = _pairs(num_tasks, grads.device)
    counts = []
    grads = grads if grads.dim() > 2 else grads.unsqueeze(1)
    for chunk in grads.split(max(1, CHUNK // max(1, grads[:, :1].numel())), 1):
        g = chunk.reshape(num_tasks, -1, p).to(wide)
        peak = g.abs().amax(-1)
        # an exact power of two near the peak: no dot product under- or overflows, and none changes sign
        scale = torch.where(peak == 0, 1, peak / (2 * peak.frexp().mantissa))
        h = g / scale.unsqueeze(-1) @ basis
        dots = [x for m in rank for x in _pair_dots(h, m)]
        finite = peak.isfinite()[first] & peak.isfinite()[second] & usable
        valid = finite if count_zero_gradients else finite & (peak[first] > 0) & (peak[second] > 0)
        counts.append(torch.stack([*((x <= 0) & valid for x in dots), valid, ~finite]).sum(-1))
    *spaces, valid, nonfinite = (_symmetric(x, num_tasks) for x in torch.stack(counts).sum(0))
    return torch.stack(spaces[::2]), torch.stack(spaces[1::2]), valid, nonfinite.sum() // 2


def projected_dots(grads: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """<U_R^T g_i, U_R^T g_j> and <U_N^T g_i, U_N^T g_j> for every pair i < j and token (Eq. 4)."""
    wide = torch.promote_types(grads.dtype, torch.float32)
    return _pair_dots(grads.to(wide) @ basis.to(wide), rank)


def projected_dots_backward(
    grad_range: Tensor, grad_null: Tensor, grads: Tensor, basis: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """dh_i = sum_j w_ij h_j, w the range gradient for c < m, the null gradient for c >= m; dg = U dh, dU = g dh^T."""
    g, u = grads.to(grad_range.dtype), basis.to(grad_range.dtype)
    parts = zip((grad_range, grad_null), _split(g @ u, rank), strict=True)
    dh = torch.cat([_symmetric(w, grads.shape[0]) @ h for w, h in parts], -1).movedim(-2, 0)
    d_basis = g.reshape(-1, len(u)).mT @ dh.reshape(-1, len(u))
    return (dh @ u.mT).to(grads.dtype), d_basis.to(basis.dtype)


def _pair_dots(h: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """h (K, ..., p) -> <h_i, h_j> over c < m and over c >= m, each (P, ...)."""
    first, second = _pairs(h.shape[0], h.device)
    range_dots, null_dots = ((x @ x.mT)[..., first, second].movedim(-1, 0) for x in _split(h, rank))
    return range_dots.contiguous(), null_dots.contiguous()


def _split(h: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(K, ..., p) -> the coordinates in the range and in the null space, (..., K, m) and (..., K, p - m)."""
    range_, null = h.movedim(0, -2).tensor_split([rank], -1)
    return range_, null


def _pairs(num_tasks: int, device: torch.device) -> Tensor:
    """i and j of the pairs i < j, in the order of itertools.combinations: (2, P)."""
    return torch.triu_indices(num_tasks, num_tasks, 1, device=device)


def _symmetric(pairs: Tensor, num_tasks: int) -> Tensor:
    """(P, ...) -> (..., K, K), zero diagonal."""
    first, second = _pairs(num_tasks, pairs.device)
    full = pairs.new_zeros(*pairs.shape[1:], num_tasks, num_tasks)
    full[..., first, second] = pairs.movedim(0, -1)
    return full + full.mT
