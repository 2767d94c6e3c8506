"""``torch.ops.dtme.modulate_concat_attention``: plain torch around two operators."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..attention import op as attention
from ..modulation import op as modulation
from ..modulation.reference import layer_norm
from ..registry import Composition, autocast_enabled
from . import reference
from .arguments import FirstHalf


def _reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return reference.modulate_concat_attention(FirstHalf(*args))


def _composed(impl: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing is concatenated; the task tokens' queries are never computed, their keys and values once.

    Attended, modulated and normalized tokens.
    """
    tokens, weight, bias, task, norm_weight, norm_bias, qkv_weight, qkv_bias, num_heads, eps, scale = FirstHalf(*args)
    p, dtype = tokens.shape[-1], task.dtype
    modulated, normalized, _ = modulation.modulate_layer_norm(impl, tokens, weight, bias, norm_weight, norm_bias, eps)
    qkv = F.linear(normalized, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
    task = layer_norm(task, norm_weight.to(dtype), norm_bias.to(dtype), eps).to(tokens.dtype)
    task_kv = F.linear(task, qkv_weight[p:], None if qkv_bias is None else qkv_bias[p:])
    out, _ = attention.packed_attention(impl, qkv, task_kv.unflatten(-1, (2, num_heads, -1)), scale)
    return out.transpose(2, 3).flatten(3), modulated, normalized


def _check(*args: Any) -> None:
    a = FirstHalf(*args)
    p = a.tokens.shape[-1]
    if a.num_heads < 1 or p % a.num_heads:
        raise ValueError(f"num_heads must divide p = {p}, got {a.num_heads}")
    attention.check_scale(a.scale)
    if autocast_enabled(a.tokens.device.type):
        return
    for name, linear in (("qkv_weight", a.qkv_weight), ("qkv_bias", a.qkv_bias)):
        if linear is not None and linear.dtype != a.tokens.dtype:
            raise TypeError(f"{name} must be {a.tokens.dtype} like tokens, got {linear.dtype}")


modulate_concat_attention = Composition(
    "modulate_concat_attention(Tensor tokens, Tensor weight, Tensor bias, Tensor task_tokens, Tensor norm_weight,"
    " Tensor norm_bias, Tensor qkv_weight, Tensor? qkv_bias, int num_heads, float eps=1e-06, float? scale=None)"
    " -> (Tensor attended, Tensor modulated)",
    modulation.NORM_TABLE | {"task_tokens": "T t p", "qkv_weight": "3p p", "qkv_bias": "3p"},
    reference=_reference,
    function=_composed,
    outputs=2,
    rules=_check,
)
