"""Second moments of tokens (Eq. 1)."""

from collections.abc import Sequence

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
    check_tensors(accumulator=accumulator)
    if isinstance(tokens, Tensor) and accumulator.dim() != 3:
        op.token_covariance_(impl, accumulator, [tokens.detach()])
        return accumulator
    if isinstance(tokens, Tensor) or accumulator.dim() != 3 or not isinstance(tokens, Sequence):
        wanted = f"a sequence of D = {len(accumulator)} tensors" if accumulator.dim() == 3 else "a tensor"
        raise TypeError(f"tokens must be {wanted}, got {type(tokens).__name__}")
    check_tensors(**{f"tokens[{d}]": x for d, x in enumerate(tokens)})
    op.token_covariance_(impl, accumulator, [x.detach() for x in tokens])
    return accumulator
