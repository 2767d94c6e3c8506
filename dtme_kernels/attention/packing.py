"""How the tensors of attention lie: packed as one projection leaves them or one by one, and what the forward saves."""

import torch
from torch import Tensor


def unpack(qkv: Tensor, task_kv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(T, B, N, 3, H, d), (T, t, 2, H, d) -> three (T, B, H, N, d) and two (T, H, t, d)."""
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).unbind()
    task_key, task_value = task_kv.permute(2, 0, 3, 1, 4).unbind()
    return query, key, value, task_key, task_value


def statistics_shape(query: Tensor) -> tuple[int, ...]:
    """(1 or 2, ..., H, N) of a query (..., H, N, d): one number per query suffices in low precision, two in float32."""
    return (1 if query.dtype in (torch.float16, torch.bfloat16) else 2, *query.shape[:-1])
