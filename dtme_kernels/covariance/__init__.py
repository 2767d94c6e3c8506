"""Second moments of tokens (Eq. 1)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_tensors
from . import op

__all__ = ["token_covariance", "token_covariance_"]


def token_covariance(tokens: Tensor, *, impl: str = "auto") -> Tensor:
    """Return the uncentred second moment ``sum x x^T`` over all tokens, Eq. 1 without its 1/n.

    Args:
        tokens: (..., p), floating point, any strides. The leading dimensions may be empty.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cpp"``.

    Returns:
        (p, p), exactly symmetric; float32 for float32 and lower precision, float64 for float64. Differentiable.

    Raises:
        TypeError: ``tokens`` is not a floating-point tensor.
        ValueError: ``tokens`` has no channels; ``impl`` is unknown.
        RuntimeError: the named ``impl`` cannot run here; the message says why.
    """
    check_tensors(tokens=tokens)
    _check_channels("tokens", tokens)
    return op.token_covariance(impl, tokens)


def token_covariance_(accumulator: Tensor, tokens: Tensor | Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """Add ``sum x x^T`` over all tokens to ``accumulator``, in place: all layers of a network in one call.

    What one call adds is formed in float32 (float64 for float64 tokens), at once or some thousand tokens at a time, and
    then added in the accumulator's dtype.
    Nothing is added when any layer is invalid. No gradient flows.

    Args:
        accumulator: (p, p), or (D, p, p) for D layers; float32 or float64.
        tokens: (..., p), or a sequence of D of them, whose leading dimensions may differ. Any strides.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cpp"``.

    Returns:
        ``accumulator``. It stays exactly symmetric.

    Raises:
        TypeError: ``accumulator`` is not float32 or float64; tokens are not floating-point tensors, or are a sequence
            with a (p, p) accumulator or the reverse.
        ValueError: a shape or device does not match, the accumulator requires grad or overlaps itself; ``impl`` is
            unknown.
        RuntimeError: the named ``impl`` cannot run here; the message says why.
    """
    _check_accumulator(accumulator)
    op.token_covariance_(impl, accumulator, _check_layers(accumulator, tokens))
    return accumulator


def _check_channels(name: str, tokens: Tensor) -> None:
    if tokens.dim() == 0 or tokens.shape[-1] == 0:
        raise ValueError(f"{name} must be (..., p) with p >= 1, got {tuple(tokens.shape)}")


def _check_accumulator(accumulator: Tensor) -> None:
    check_tensors(accumulator=accumulator)
    shape = tuple(accumulator.shape)
    if accumulator.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"accumulator must be float32 or float64, got {accumulator.dtype}")
    if len(shape) not in (2, 3) or shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(f"accumulator must be (p, p) or (D, p, p) with p >= 1, got {shape}")
    if accumulator.requires_grad:
        raise ValueError("accumulator must not require grad: it is added to in place")
    if any(stride == 0 and size > 1 for stride, size in zip(accumulator.stride(), shape, strict=True)):
        raise ValueError(f"accumulator must not overlap itself, got strides {accumulator.stride()}")


def _check_layers(accumulator: Tensor, tokens: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The tokens of every layer, detached."""
    layers: dict[str, Any] = {"tokens": tokens}
    if accumulator.dim() == 3:
        num_layers = len(accumulator)
        if not isinstance(tokens, Sequence):
            raise TypeError(f"tokens must be a sequence of D = {num_layers} tensors, got {type(tokens).__name__}")
        if len(tokens) != num_layers:
            raise ValueError(
                f"tokens must be a sequence of D = {num_layers} tensors like accumulator, got {len(tokens)}"
            )
        layers = {f"tokens[{d}]": x for d, x in enumerate(tokens)}
    check_tensors(accumulator=accumulator, **layers)
    p = accumulator.shape[-1]
    for name, x in layers.items():
        _check_channels(name, x)
        if x.shape[-1] != p:
            raise ValueError(f"{name} must be (..., p) with p = {p} like accumulator, got {tuple(x.shape)}")
    return [x.detach() for x in layers.values()]
