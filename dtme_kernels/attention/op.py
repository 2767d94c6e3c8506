"""Schemas, shapes, gradient and dispatch of ``torch.ops.dtme.expanded_attention`` and ``modulate_concat_attention``."""

from typing import Any

from torch import Tensor

from ..registry import Operator
from . import composite, reference


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    task_key: Tensor,
    task_value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    *lead, num_heads, num_queries, d = query.shape
    return query.new_empty((*lead, num_queries, num_heads, d)).transpose(-3, -2)


def _backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    task_key: Tensor,
    task_value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    mask_grad: bool,
) -> tuple[Tensor, ...]:
    d_mask = attn_mask.new_empty(attn_mask.shape) if mask_grad and attn_mask is not None else query.new_empty(0)
    return *(x.new_empty(x.shape) for x in (query, key, value, task_key, task_value)), d_mask


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_causal, ctx.scale = inputs
    # needs_input_grad ends where the defaults begin
    ctx.mask_grad = tensors[-1] is not None and ctx.needs_input_grad[5]
    ctx.save_for_backward(*tensors)


def _backward(call: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    args = (*ctx.saved_tensors, ctx.is_causal, ctx.scale, ctx.mask_grad)
    *grads, d_mask = call(grad, *args)
    return *grads, d_mask if ctx.mask_grad else None, None, None


expanded_attention = Operator(
    "expanded_attention(Tensor query, Tensor key, Tensor value, Tensor task_key, Tensor task_value,"
    " Tensor? attn_mask=None, bool is_causal=False, float? scale=None) -> Tensor",
    reference.expanded_attention,
    _fake,
    low_precision=True,
)
expanded_attention_backward = Operator(
    "expanded_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor task_key,"
    " Tensor task_value, Tensor? attn_mask, bool is_causal, float? scale, bool mask_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.expanded_attention_backward,
    _backward_fake,
)
expanded_attention.differentiate(_setup, _backward, once=expanded_attention_backward)
modulate_concat_attention = Operator(
    "modulate_concat_attention(Tensor tokens, Tensor weight, Tensor bias, Tensor task_tokens, Tensor norm_weight,"
    " Tensor norm_bias, Tensor qkv_weight, Tensor? qkv_bias, int num_heads, float eps=1e-06, float? scale=None)"
    " -> (Tensor attended, Tensor modulated)",
    reference.modulate_concat_attention,
    composite=composite.modulate_concat_attention,
)
