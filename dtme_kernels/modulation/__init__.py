"""Token modulation: a scale and a shift of every channel, one pair per task stream (Sec. 4.3)."""

from torch import Tensor

from ..checks import check_number, check_tensors
from . import op

__all__ = ["modulate", "modulate_layer_norm"]


def modulate(tokens: Tensor, weight: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """Return ``weight[t] * tokens + bias[t]`` for every task stream t.

    Args:
        tokens: (B, N, p), shared by all streams, or (T, B, N, p); floating point, any strides.
        weight, bias: (T, p), of one floating dtype. Weight 1 and bias 0 return the tokens as they are.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cpp"``.

    Returns:
        (T, B, N, p), contiguous, dtype of ``tokens``. Computed in float32 (float64 for float64). Differentiable, once,
        in all three; gradients are summed in float32 and returned in their argument's dtype.

    Raises:
        TypeError: an argument is not a floating-point tensor, ``weight`` and ``bias`` differ in dtype.
        ValueError: a shape or device does not match; ``impl`` is unknown.
        RuntimeError: the named ``impl`` cannot run here; the message says why.
    """
    check_tensors(tokens=tokens, weight=weight, bias=bias)
    return op.modulate(impl, tokens, weight, bias)


def modulate_layer_norm(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-6,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return ``y = weight[t] * tokens + bias[t]`` and its layer norm, in one pass over the tokens.

    The norm is ``(y - mean(y)) / sqrt(var(y) + eps) * norm_weight + norm_bias`` over channels, taken of y before y is
    rounded to the dtype of ``tokens``.

    Args:
        tokens, weight, bias: as ``modulate``.
        norm_weight, norm_bias: (p,), of one floating dtype.
        eps: added to the variance.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cpp"``.

    Returns:
        (modulated, normalized), both (T, B, N, p), contiguous, dtype of ``tokens``. Statistics in float32 (float64 for
        float64). Differentiable, once, in all five tensors.

    Raises:
        As ``modulate``; ``norm_weight`` and ``norm_bias`` likewise.
    """
    check_tensors(tokens=tokens, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    check_number("eps", eps, 0)
    modulated, normalized, _ = op.modulate_layer_norm(impl, tokens, weight, bias, norm_weight, norm_bias, float(eps))
    return modulated, normalized
