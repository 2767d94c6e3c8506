"""Token expansion: attention whose keys and values are extended by task tokens (Sec. 4.3)."""

from torch import Tensor

from ..checks import check_number, check_tensors
from ..choice import resolve
from . import op

__all__ = ["expanded_attention"]


def expanded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    task_key: Tensor,
    task_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return ``softmax(scale * query [key ; task_key]^T + mask) [value ; task_value]``.

    Equals ``scaled_dot_product_attention`` over the concatenated keys and values. Task keys are visible to every query.

    Args:
        query: (T, B, H, N, d), T task streams; or (B, H, N, d). Floating point, any strides.
        key, value: (T, B, H', S, d), or without T. H' divides H (grouped-query attention); S is usually N.
        task_key, task_value: (T, H', t, d), or without T; t >= 0. The same for every image.
        attn_mask: over the S shared keys only, broadcastable to (T, B, H, N, S): bool (True is visible) or additive.
        is_causal: query i sees shared keys j <= i. Not together with ``attn_mask``.
        dropout_p: of the probabilities, in [0, 1). Above 0, ``auto`` takes the reference.
        scale: default ``1 / sqrt(d)``.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cpp"``.

    Returns:
        Shape and dtype of ``query`` (autocast's dtype under autocast), laid out so that merging heads,
        ``transpose(-3, -2).flatten(-2)``, is a view. Differentiable, once, in the five tensors and an additive mask.

    Raises:
        TypeError: an argument is not a floating-point tensor; dtypes differ outside autocast; ``attn_mask`` is neither.
        ValueError: a shape or device does not match, ``attn_mask`` with ``is_causal``, ``dropout_p`` outside [0, 1);
            ``impl`` is unknown.
        RuntimeError: the named ``impl`` cannot run here; the message says why.
    """
    tensors = {"query": query, "key": key, "value": value, "task_key": task_key, "task_value": task_value}
    check_tensors(**tensors, **({} if attn_mask is None else {"attn_mask": attn_mask}))
    check_number("dropout_p", dropout_p, 0, 1)
    if scale is not None:
        check_number("scale", scale, float("-inf"))
    args = (*tensors.values(), attn_mask, bool(is_causal), scale)
    if not dropout_p:
        output, _ = op.expanded_attention(impl, *args)
        return output
    if (impl := resolve(impl)) not in ("auto", "reference"):
        raise RuntimeError(f"impl={impl!r} cannot run expanded_attention: dropout is the reference's")
    output, _ = op.expanded_attention.run_reference(*args, dropout_p=dropout_p)
    return output
