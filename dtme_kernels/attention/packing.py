"""How the tensors of attention lie: packed as one projection leaves them or one by one, and what the forward saves."""

import torch
from torch import Tensor


def unpack(qkv: Tensor, task_kv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(T, B, N, 3, H, d), (T, t, 2, H, d) -> three (T, B, H, N, d) and two (T, H, t, d)."""
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).unbind()
    task_key, task_value = task_kv.permute(2, 0, 3, 1, 4).unbind()
    return query, key, value, task_key, task_value


def statistics_shape(query: Tensor, attn_mask: Tensor | None) -> tuple[int, ...]:
    """(..., H, 1 or 2, N) for a query (..., H, N, d): in low precision a log-sum-exp will do.

    Not in float32, and not with an additive mask, whose lowest finite number would swallow the logarithm of the sum.
    """
    low = query.dtype in (torch.float16, torch.bfloat16)
    additive = attn_mask is not None and attn_mask.dtype != torch.bool
    return (*query.shape[:-2], 1 if low and not additive else 2, query.shape[-2])
