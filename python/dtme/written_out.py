"""Attention for models that write theirs out, and whose own score maps they need."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention", "attention_of_scores", "attention_weights"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``scaled_dot_product_attention``; inside a block that ``expand`` gave task tokens, their keys and values join.

    Most attentions that are written out take task tokens as they are. This is for those that do something with their
    scores that ``expand`` refuses, or that would rather not form them.

    Args:
        query: (B, H, N, d).
        key, value: (B, H', M, d); H' divides H (grouped-query attention).
        attn_mask: broadcastable to (B, H, N, M), bool (True is visible) or additive; of the keys given here alone, as
            task keys are never masked.
        is_causal: query i sees keys j <= i. Not together with ``attn_mask``.
        dropout_p: of the weights, whether in training or not.
        scale: of the scores; by default ``1 / sqrt(d)``.
        return_scores: return the scores, too.

    Returns:
        (B, H, N, d), or that and (B, H, N, M): scale * query · key + mask, the softmax's argument for the keys given
        here; those of task keys are left out.

    Raises:
        ValueError: a shape does not match, or a mask is given with ``is_causal``.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (B, H, N, d), got {tuple(tensor.shape)}")
    if query.shape[1] % max(key.shape[1], 1) or key.shape[1] != value.shape[1]:
        heads = [tensor.shape[1] for tensor in (query, key, value)]
        raise ValueError(f"the heads of key and value must be as many, and divide those of query, got {heads}")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal must be False with an attn_mask")
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    if not return_scores:
        return out
    with torch._C.DisableTorchFunction():  # or the product would be taken for another attention
        return out, attention_scores(query, key, attn_mask, is_causal, scale)


def attention_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None = None,
) -> Tensor:
    """(..., H, N, M): scale * query · key + mask, of queries (..., H, N, d) and keys (..., H', M, d).

    Args:
        softcap: what ``softcap * tanh(scores / softcap)`` keeps the scores below, before the mask.
    """
    if query.shape[-3] != key.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale) @ key.mT
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return scores
    return scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """(..., H, N, M): how much each query takes of each key, in float32 or better."""
    scores = attention_scores(query, key, attn_mask, is_causal, scale)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def attention_of_scores(
    scores: Tensor,
    query: Tensor,
    value: Tensor | None,
    task_key: Tensor,
    task_value: Tensor,
    scale: float | None,
    shift: float | Tensor | None,
    dropout_p: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention whose scores (..., H, N, M) of the shared keys are there already; of None the weights of those keys.

    Args:
        query: (..., H, N, d); the scores of task keys (..., H', t, d) are scale * query · task_key + shift.
        shift: a number, or broadcastable to (..., H, N, 1).
        softcap: of the scores of task keys, as of those that are there.
        sinks: (H,), the score of one more key in every head, which has no value.
    """
    of_tasks = attention_scores(query, task_key, None, False, scale, softcap)
    of_tasks = of_tasks if shift is None else of_tasks + shift
    wide = torch.promote_types(scores.dtype, torch.float32)
    parts = [scores.to(wide), of_tasks.to(wide)]
    if sinks is not None:
        parts.append(sinks.to(wide)[:, None, None].expand(*scores.shape[:-1], 1))
    num_keys = scores.shape[-1]
    weights = torch.cat(parts, -1).softmax(-1)[..., : num_keys + of_tasks.shape[-1]]
    if value is None:
        return weights[..., :num_keys]
    weights = F.dropout(weights, dropout_p).to(value.dtype) if dropout_p else weights.to(value.dtype)
    values = [value, task_value]
    if value.shape[-3] != weights.shape[-3]:
        values = [x.repeat_interleave(weights.shape[-3] // x.shape[-3], -3) for x in values]
    return weights[..., :num_keys] @ values[0] + weights[..., num_keys:] @ values[1]
