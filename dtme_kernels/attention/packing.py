"""Queries, keys and values as one projection leaves them, and one by one: views of the same memory."""

from torch import Tensor


def unpack(qkv: Tensor, task_kv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(T, B, N, 3, H, d), (T, t, 2, H, d) -> three (T, B, H, N, d) and two (T, H, t, d)."""
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).unbind()
    task_key, task_value = task_kv.permute(2, 0, 3, 1, 4).unbind()
    return query, key, value, task_key, task_value
