"""What the implementations of the first half of a block are given."""

from typing import NamedTuple

from torch import Tensor


class FirstHalf(NamedTuple):
    """The arguments of ``torch.ops.dtme.modulate_concat_attention``, in its order."""

    tokens: Tensor
    """([T,] B, N, p)"""
    weight: Tensor
    """(T, p), as ``bias``"""
    bias: Tensor
    task_tokens: Tensor
    """(T, t, p)"""
    norm_weight: Tensor
    """(p,), as ``norm_bias``"""
    norm_bias: Tensor
    qkv_weight: Tensor
    """(3p, p)"""
    qkv_bias: Tensor | None
    """(3p,)"""
    num_heads: int
    eps: float
    scale: float | None
