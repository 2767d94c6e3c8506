"""Token expansion: attention whose keys and values are extended by task tokens (Sec. 4.3)."""

import torch
from torch import Tensor

from ..checks import check_dtypes, check_number, check_shape, check_tensors
from ..modulation import check_modulation, check_norm
from ..registry import autocast_enabled
from . import op

__all__ = ["expanded_attention", "modulate_concat_attention"]


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
    check_tensors(**tensors)
    if not autocast_enabled(query.device.type):
        check_dtypes(**tensors)
    _check_shapes(query, key, value, task_key, task_value)
    if attn_mask is not None:
        _check_mask(attn_mask, query, key)
        if is_causal:
            raise ValueError("is_causal must be False with an attn_mask")
    check_number("dropout_p", dropout_p, 0, 1)
    if scale is not None:
        check_number("scale", scale, float("-inf"))
    args = (query, key, value, task_key, task_value, attn_mask, bool(is_causal), scale)
    if dropout_p:
        return op.expanded_attention("reference" if impl == "auto" else impl, *args, dropout_p)[0]
    return op.expanded_attention(impl, *args)[0]


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
        impl: ``"auto"``, ``"reference"``, which does concatenate, ``"triton"`` or ``"cpp"``.

    Returns:
        (attended, modulated), both (T, B, N, p): heads merged, before the output projection; and the residual stream,
        in the dtype of ``tokens``. With ``return_normalized``, (attended, modulated, normalized). Differentiable, once,
        in all tensors.

    Raises:
        TypeError, ValueError, RuntimeError: as ``modulate_layer_norm`` and ``expanded_attention``; ``num_heads`` is
            not an int that divides p.
    """
    check_modulation(tokens, weight, bias)
    check_norm(tokens, norm_weight, norm_bias)
    linear = {"qkv_weight": qkv_weight} | ({} if qkv_bias is None else {"qkv_bias": qkv_bias})
    check_tensors(tokens=tokens, task_tokens=task_tokens, **linear)
    if not autocast_enabled(tokens.device.type):
        check_dtypes(tokens=tokens, **linear)
    p = tokens.shape[-1]
    if task_tokens.dim() != 3:
        raise ValueError(f"task_tokens must be (T, t, p), got {tuple(task_tokens.shape)}")
    check_shape("task_tokens", task_tokens, "(T, t, p)", (weight.shape[0], task_tokens.shape[1], p))
    check_shape("qkv_weight", qkv_weight, "(3p, p)", (3 * p, p))
    if qkv_bias is not None:
        check_shape("qkv_bias", qkv_bias, "(3p,)", (3 * p,))
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {num_heads!r}")
    if num_heads < 1 or p % num_heads:
        raise ValueError(f"num_heads must divide p = {p}, got {num_heads}")
    check_number("eps", eps, 0)
    if scale is not None:
        check_number("scale", scale, float("-inf"))
    tensors = (tokens, weight, bias, task_tokens, norm_weight, norm_bias, qkv_weight, qkv_bias)
    args = (*tensors, num_heads, float(eps), scale)
    return op.first_half(impl, *args) if return_normalized else op.modulate_concat_attention(impl, *args)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, task_key: Tensor, task_value: Tensor) -> None:
    shape = tuple(query.shape)
    if len(shape) not in (4, 5) or shape[-3] == 0 or shape[-1] == 0:
        raise ValueError(f"query must be (T, B, H, N, d) or (B, H, N, d) with H, d >= 1, got {shape}")
    *lead, num_heads, _, d = shape
    streams, t = ("T, ", tuple(lead[:-1])) if len(shape) == 5 else ("", ())
    if key.dim() != len(shape):
        raise ValueError(f"key must be ({streams}B, H, S, d) like query {shape}, got {tuple(key.shape)}")
    key_heads, num_keys = key.shape[-3:-1]
    check_shape("key", key, f"({streams}B, H, S, d)", (*lead, key_heads, num_keys, d))
    if key_heads == 0 or num_heads % key_heads:
        raise ValueError(f"key heads must divide the {num_heads} heads of query, got {key_heads}")
    check_shape("value", value, f"({streams}B, H, S, d)", (*lead, key_heads, num_keys, d))
    if task_key.dim() != len(shape) - 1:
        raise ValueError(f"task_key must be ({streams}H, t, d) for query {shape}, got {tuple(task_key.shape)}")
    check_shape("task_key", task_key, f"({streams}H, t, d)", (*t, key_heads, task_key.shape[-2], d))
    check_shape("task_value", task_value, f"({streams}H, t, d)", (*t, key_heads, task_key.shape[-2], d))


def _check_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or floating point, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on {query.device} like query, got {attn_mask.device}")
    full = (*query.shape[:-1], key.shape[-2])
    sizes = zip(reversed(attn_mask.shape), reversed(full), strict=False)
    if not 1 <= attn_mask.dim() <= len(full) or any(have not in (1, want) for have, want in sizes):
        raise ValueError(f"attn_mask must broadcast to {full}, got {tuple(attn_mask.shape)}")
