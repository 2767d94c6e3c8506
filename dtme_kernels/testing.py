"""Inputs that break kernels and the error they are allowed: shared by tests and benchmarks."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *LOW_PRECISION)

# Each keeps the shape, (..., p) with at least two dimensions; only "expanded" changes values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "odd offset": lambda x: F.pad(x, (1, 2))[..., 1:-2],
    "expanded": lambda x: x[:1].expand_as(x),
}


def make(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    layout: str = "contiguous",
    seed: int = 0,
    requires_grad: bool = False,
) -> Tensor:
    """Standard normal values, the same on every device, in one of ``LAYOUTS``; on torch's default device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return LAYOUTS[layout](values.to(device or torch.get_default_device(), dtype)).requires_grad_(requires_grad)


def orthogonal(p: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A (p, p) basis."""
    return torch.linalg.qr(make(p, p, dtype=torch.float64, seed=seed)).Q.to(dtype)


def exact(*tensors: Tensor) -> list[np.ndarray]:
    """The values a kernel is given, in NumPy's float64."""
    return [x.detach().cpu().double().numpy() for x in tensors]


def assert_accurate(got: Tensor, want: np.ndarray | Tensor, plain: Tensor, terms: int = 1) -> None:
    """``max|got - want| <= 2 max|plain - want| + sqrt(terms) eps max|want|``, eps that of the dtype of ``got``.

    Args:
        got: what is tested.
        want: the exact value, float64.
        plain: what plain torch makes of the same problem in the same dtype.
        terms: additions in a long sum: M for a sum over M tokens.

    Raises:
        AssertionError: over budget, another shape, or a NaN.
    """
    error, budget = accuracy(got, want, plain, terms)
    assert error <= budget, f"error {error:.3g} is over the budget {budget:.3g}, mostly twice plain torch's error"


def accuracy(
    got: Tensor, want: np.ndarray | Tensor, plain: Tensor, terms: int = 1, eps: float | None = None
) -> tuple[float, float]:
    """The largest error, which may be NaN, and what ``assert_accurate`` allows; on the device of ``got``.

    Args:
        eps: another than that of the dtype of ``got``.

    Raises:
        AssertionError: another shape.
    """
    want, plain = torch.as_tensor(want, dtype=torch.float64, device=got.device), plain.to(got.device)
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error, of_plain, size = (_largest(x) for x in (got - want, plain - want, want))
    return error, 2 * of_plain + terms**0.5 * (eps or torch.finfo(got.dtype).eps) * size


def _largest(x: Tensor) -> float:
    return x.detach().abs().max().item() if x.numel() else 0.0
