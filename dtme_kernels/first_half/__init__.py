"""The first half of an expanded pre-norm block: modulate, layer norm, qkv, expanded attention (Sec. 4.3)."""

from torch import Tensor

from ..checks import check_number, check_tensors
from . import op

__all__ = ["modulate_concat_attention"]


def modulate_concat_attention(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    task_tokens: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    scale: float | None = None,
    return_normalized: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Run the first half of an expanded pre-norm block: modulate, layer norm, qkv, expanded attention.

    Equals, to rounding, appending ``task_tokens`` to the modulated tokens, running the block's norm, qkv and attention
    on N + t tokens and dropping the last t outputs. Task tokens are not modulated; their queries are never computed,
    and their keys and values once, not once per image.

    Args:
        tokens: (B, N, p), shared by all streams, or (T, B, N, p).
        weight, bias: (T, p), of one dtype.
        task_tokens: (T, t, p), t >= 0.
        norm_weight, norm_bias: (p,), of one dtype.
        qkv_weight: (3p, p), rows in the order q, k, v, heads within; dtype of ``tokens`` outside autocast.
        qkv_bias: (3p,) or None.
        num_heads: H, divides p.
        eps: of the layer norm.
        scale: default ``1 / sqrt(p / H)``.
        return_normalized: return the layer norm of the modulated tokens too.
        impl: ``"auto"``, ``"reference"``, which does concatenate, ``"triton"`` or ``"cpp"``, for the operations inside.

    The projections are torch's own ``linear``, whose last bits on the CPU may change with the number of threads; no
    other operation's do.

    Returns:
        (attended, modulated), both (T, B, N, p): heads merged, before the output projection; and the residual stream,
        in the dtype of ``tokens``. With ``return_normalized``, (attended, modulated, normalized). Differentiable, once,
        in all tensors.

    Raises:
        TypeError, ValueError, RuntimeError: as ``modulate_layer_norm`` and ``expanded_attention``; ``num_heads`` is
            not an int that divides p.
    """
    tensors = {"tokens": tokens, "weight": weight, "bias": bias, "task_tokens": task_tokens}
    tensors |= {"norm_weight": norm_weight, "norm_bias": norm_bias, "qkv_weight": qkv_weight}
    check_tensors(**tensors, **({} if qkv_bias is None else {"qkv_bias": qkv_bias}))
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {num_heads!r}")
    check_number("eps", eps, 0)
    if scale is not None:
        check_number("scale", scale, float("-inf"))
    args = (*tensors.values(), qkv_bias, num_heads, float(eps), scale)
    attended, modulated, normalized = op.modulate_concat_attention(impl, *args)
    return (attended, modulated, normalized) if return_normalized else (attended, modulated)
