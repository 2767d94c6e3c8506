"""What the implementations of attention are given, and what the forward leaves for the backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    """The arguments of ``torch.ops.dtme.expanded_attention``, in its order."""

    query: Tensor
    """([T,] B, H, N, d)"""
    key: Tensor
    """([T,] B, H', S, d), as ``value``"""
    value: Tensor
    task_key: Tensor
    """([T,] H', t, d), as ``task_value``"""
    task_value: Tensor
    attn_mask: Tensor | None = None
    """Broadcasts to ([T,] B, H, N, S); bool or additive."""
    is_causal: bool = False
    scale: float | None = None

    @property
    def factor(self) -> float:
        """Of the scores: ``scale``, or what stands for None."""
        return float(self.query.shape[-1] ** -0.5) if self.scale is None else self.scale

    @property
    def has_additive_mask(self) -> bool:
        return self.attn_mask is not None and self.attn_mask.dtype != torch.bool

    @property
    def statistics_shape(self) -> tuple[int, ...]:
        """(..., H, 1 or 2, N): in low precision a log-sum-exp will do.

        Not in float32, and not with an additive mask, whose lowest finite number would swallow the logarithm of the
        sum.
        """
        *lead, num_queries, _ = self.query.shape
        low = self.query.dtype in (torch.float16, torch.bfloat16)
        return (*lead, 1 if low and not self.has_additive_mask else 2, num_queries)


class AttentionBackward(NamedTuple):
    """The arguments of ``torch.ops.dtme.expanded_attention_backward``."""

    grad: Tensor
    output: Tensor
    statistics: Tensor
    attention: Attention
    wants_mask_grad: bool

    @classmethod
    def of(cls, grad: Tensor, output: Tensor, statistics: Tensor, *args: Any) -> "AttentionBackward":
        *attention, mask_grad = args
        inputs = Attention(*attention)
        return cls(grad, output, statistics, inputs, mask_grad and inputs.has_additive_mask)


class PackedBackward(NamedTuple):
    """The arguments of ``torch.ops.dtme.packed_attention_backward``."""

    grad: Tensor
    output: Tensor
    statistics: Tensor
    qkv: Tensor
    task_kv: Tensor
    scale: float | None

    @property
    def attention(self) -> Attention:
        return unpack(self.qkv, self.task_kv, self.scale)


def unpack(qkv: Tensor, task_kv: Tensor, scale: float | None = None) -> Attention:
    """(T, B, N, 3, H, d), (T, t, 2, H, d) -> three (T, B, H, N, d) and two (T, H, t, d), views."""
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).unbind()
    task_key, task_value = task_kv.permute(2, 0, 3, 1, 4).unbind()
    return Attention(query, key, value, task_key, task_value, scale=scale)
