"""The token space of a block, split into range and null space (Eq. 1-3)."""

from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from .choice import check_impl

__all__ = ["TokenSpace", "split_token_space"]


@dataclass(frozen=True, eq=False)
class TokenSpace:
    """Eigenvectors and eigenvalues of one block's tokens, or of D blocks', and the ranks that split them.

    Attributes:
        basis: (..., p, p), orthonormal columns, eigenvalues descending. The largest entry of a column is positive.
        eigenvalues: (..., p), not negative.
        rank: m, number of leading columns that span the range space, in [1, p-1]; (D,) int64 for D blocks.
    """

    basis: Tensor
    eigenvalues: Tensor
    rank: int | Tensor

    @property
    def range_basis(self) -> Tensor:
        """U_R, (p, m). Raises ValueError for more than one block: their ranks differ."""
        return self.basis[:, : self._single_rank()]

    @property
    def null_basis(self) -> Tensor:
        """U_N, (p, p - m). Raises ValueError for more than one block: their ranks differ."""
        return self.basis[:, self._single_rank() :]

    def at(self, ratio: float) -> "TokenSpace":
        """The same eigenvectors, split at another ratio as ``split_token_space`` would.

        Raises:
            TypeError, ValueError: ``ratio`` is not a positive number.
        """
        _check_ratio(ratio)
        _, exponent = self.eigenvalues.amax(-1, keepdim=True).frexp()
        rank = _rank(self.eigenvalues.double().ldexp(-exponent), ratio)
        return TokenSpace(self.basis, self.eigenvalues, int(rank) if rank.dim() == 0 else rank)

    def to(self, device: torch.device | str) -> "TokenSpace":
        """The same split on another device."""
        rank = self.rank.to(device) if isinstance(self.rank, Tensor) else self.rank
        return TokenSpace(self.basis.to(device), self.eigenvalues.to(device), rank)

    def _single_rank(self) -> int:
        if isinstance(self.rank, Tensor):
            raise ValueError(f"range_basis and null_basis are for one block, this space holds {len(self.rank)}")
        return self.rank


def split_token_space(covariance: Tensor, ratio: float = 100.0, *, impl: str = "auto") -> TokenSpace:
    """Split the token space where the leading eigenvalues outweigh the rest ``ratio`` times.

    ``C = U diag(l) U^T``; m counts the leading k with ``(l_1 + ... + l_k) / (l_k+1 + ... + l_p) < ratio`` (Eq. 3),
    clamped to [1, p-1]. The scale of C does not matter. The decomposition is float64 whatever the dtype of C.

    Args:
        covariance: (p, p) or (D, p, p), symmetric, p >= 2, float32 or float64.
        ratio: r > 0, energy of the range space over energy of the null space.
        impl: ``"auto"`` or ``"reference"``, the same here, also inside ``dtme_kernels.implementation``: the
            eigen-decomposition is torch's.

    Returns:
        ``TokenSpace`` in the dtype of ``covariance``.

    Raises:
        TypeError: ``covariance`` is not a float32 or float64 tensor.
        ValueError: not square, p < 2, not symmetric, NaN or Inf (the layers are named); ``ratio`` is not positive;
            ``impl`` is unknown.
        RuntimeError: ``impl`` is ``"triton"`` or ``"cpp"``.
    """
    if check_impl(impl) not in ("auto", "reference"):
        raise RuntimeError(f"impl={impl!r} cannot run split_token_space: it has no kernel of its own")
    _check(covariance, ratio)
    scaled = covariance.detach().double()
    # to about 1, by a power of two that changes no digit: neither C + C^T nor a sum of eigenvalues is to overflow
    _, exponent = scaled.abs().amax((-2, -1), keepdim=True).frexp()
    scaled = scaled.ldexp(-exponent)
    values, vectors = torch.linalg.eigh((scaled + scaled.mT) / 2)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    # an eigenvector is free up to its sign
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)

    rank = _rank(values, ratio)
    values = values.ldexp(exponent.squeeze(-1))
    return TokenSpace(vectors.to(covariance.dtype), values.to(covariance.dtype), int(rank) if rank.dim() == 0 else rank)


def _rank(values: Tensor, ratio: float) -> Tensor:
    """(..., p) eigenvalues, descending, whose sum does not overflow -> (...), Eq. 3."""
    head = values.cumsum(-1)
    # summed from the small end: "total minus head" would be rounding error just where the split falls
    tail = F.pad(values[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    return (head / tail < ratio).sum(-1).clamp(1, values.shape[-1] - 1)


def _check_ratio(ratio: float) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise TypeError(f"ratio must be a number, got {ratio!r}")
    if not ratio > 0:
        raise ValueError(f"ratio must be > 0, got {ratio}")


def _check(covariance: Tensor, ratio: float) -> None:
    if not isinstance(covariance, Tensor):
        raise TypeError(f"covariance must be a tensor, got {type(covariance).__name__}")
    if covariance.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"covariance must be float32 or float64, got {covariance.dtype}")
    shape = tuple(covariance.shape)
    if len(shape) not in (2, 3) or shape[-1] != shape[-2] or shape[-1] < 2:
        raise ValueError(f"covariance must be (p, p) or (D, p, p) with p >= 2, got {shape}")
    _check_ratio(ratio)

    def refuse(layers: Tensor, problem: str) -> None:
        if layers.any():
            where = f" of layers {layers.nonzero().flatten().tolist()}" if layers.dim() else ""
            raise ValueError(f"covariance{where} {problem}")

    refuse(~covariance.isfinite().flatten(-2).all(-1), "holds NaN or Inf")
    asymmetry = (covariance - covariance.mT).abs().amax((-2, -1))
    tolerance = torch.finfo(covariance.dtype).eps ** 0.5 * covariance.abs().amax((-2, -1))
    refuse(asymmetry > tolerance, "is not symmetric")
