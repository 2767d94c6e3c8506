"""What runs for the first half of a block: plain torch around two operators."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..registry import OPERATORS


def first_half(
    impl: str,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    task_tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing is concatenated; the task tokens' queries are never computed, their keys and values once.

    Attended, modulated and normalized tokens.
    """
    p = tokens.shape[-1]
    modulation = (tokens, weight, bias, norm_weight, norm_bias, eps)
    modulated, normalized, _ = OPERATORS["modulate_layer_norm"](impl, *modulation)
    qkv = F.linear(normalized, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
    dtype = task_tokens.dtype
    task = F.layer_norm(task_tokens, (p,), norm_weight.to(dtype), norm_bias.to(dtype), eps).to(tokens.dtype)
    task_kv = F.linear(task, qkv_weight[p:], None if qkv_bias is None else qkv_bias[p:])
    task_kv = task_kv.unflatten(-1, (2, num_heads, -1))
    out, _ = OPERATORS["packed_attention"](impl, qkv, task_kv, scale)
    return out.transpose(2, 3).flatten(3), modulated, normalized


def modulate_concat_attention(impl: str, *args: Any) -> tuple[Tensor, Tensor]:
    return first_half(impl, *args)[:2]
