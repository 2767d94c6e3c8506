"""Schemas, shapes, gradient and dispatch of ``torch.ops.dtme.expanded_attention`` and ``modulate_concat_attention``."""

from typing import Any

import torch
from torch import Tensor

from ..launch import cannot_run, highest
from ..registry import Operator, library, off_cpu
from . import composite, reference
from .composite import first_half as first_half
from .packing import statistics_shape, unpack
from .tiles import MOST_CHANNELS, MOST_CHANNELS_IN_THREE_PARTS


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    task_key: Tensor,
    task_value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    *lead, num_heads, num_queries, d = query.shape
    output = query.new_empty((*lead, num_queries, num_heads, d)).transpose(-3, -2)
    return output, query.new_empty(statistics_shape(query, attn_mask), dtype=torch.float32)


def _backward_fake(
    grad: Tensor,
    output: Tensor,
    statistics: Tensor,
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.scale = inputs
    # needs_input_grad ends where the defaults begin
    needed = getattr(ctx, "needed", ctx.needs_input_grad)
    ctx.mask_grad = tensors[-1] is not None and tensors[-1].is_floating_point() and needed[5]
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(call: Any, ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    args = (*ctx.saved_tensors, ctx.is_causal, ctx.scale, ctx.mask_grad)
    *grads, d_mask = call(grad, *args)
    return *grads, d_mask if ctx.mask_grad else None, None, None


def _packed_fake(qkv: Tensor, task_kv: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    return _fake(*unpack(qkv, task_kv))


def _packed_backward_fake(
    grad: Tensor, output: Tensor, statistics: Tensor, qkv: Tensor, task_kv: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), task_kv.new_empty(task_kv.shape)


def _packed_setup(ctx: Any, inputs: tuple[Tensor, Tensor, float | None], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _packed_backward(call: Any, ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *call(grad, *ctx.saved_tensors, ctx.scale), None


# statistics: how a kernel's own backward finds the probabilities again; the reference's needs none, and has zeros there
_ARGUMENTS = (
    "(Tensor query, Tensor key, Tensor value, Tensor task_key, Tensor task_value, Tensor? attn_mask=None,"
    " bool is_causal=False, float? scale=None)"
)
expanded_attention = Operator(
    f"expanded_attention_forward{_ARGUMENTS} -> (Tensor output, Tensor statistics)",
    reference.expanded_attention,
    _fake,
    public="expanded_attention",
    low_precision=True,
)
expanded_attention_backward = Operator(
    "expanded_attention_backward(Tensor grad, Tensor output, Tensor statistics, Tensor query, Tensor key, Tensor value,"
    " Tensor task_key, Tensor task_value, Tensor? attn_mask, bool is_causal, float? scale, bool mask_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.expanded_attention_backward,
    _backward_fake,
)
expanded_attention.differentiate(_setup, _backward, once=expanded_attention_backward)
library.define(f"expanded_attention{_ARGUMENTS} -> Tensor")
library.impl("expanded_attention", lambda *args: expanded_attention.overload(*args)[0], "CompositeImplicitAutograd")
packed_attention = Operator(
    "packed_attention(Tensor qkv, Tensor task_kv, float? scale=None) -> (Tensor output, Tensor statistics)",
    reference.packed_attention,
    _packed_fake,
    low_precision=True,
)
packed_attention_backward = Operator(
    "packed_attention_backward(Tensor grad, Tensor output, Tensor statistics, Tensor qkv, Tensor task_kv, float? scale)"
    " -> (Tensor, Tensor)",
    reference.packed_attention_backward,
    _packed_backward_fake,
)
packed_attention.differentiate(_packed_setup, _packed_backward, once=packed_attention_backward)
modulate_concat_attention = Operator(
    "modulate_concat_attention(Tensor tokens, Tensor weight, Tensor bias, Tensor task_tokens, Tensor norm_weight,"
    " Tensor norm_bias, Tensor qkv_weight, Tensor? qkv_bias, int num_heads, float eps=1e-06, float? scale=None)"
    " -> (Tensor attended, Tensor modulated)",
    reference.modulate_concat_attention,
    composite=composite.modulate_concat_attention,
)


def _unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    task_key: Tensor,
    task_value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> str | None:
    if dropout_p:
        return "dropout is the reference's"
    exact = query.dtype == torch.float32 and highest()
    most = MOST_CHANNELS_IN_THREE_PARTS if exact else MOST_CHANNELS
    if query.shape[-1] > most:
        precision = " of float32 at matrix precision 'highest'" if exact else ""
        return f"the kernels take {most} channels a head at most{precision}, got {query.shape[-1]}"
    return cannot_run(query)


_KERNELS = f"{__package__}.kernel"
expanded_attention.implement_triton(_KERNELS, _unsupported)
expanded_attention_backward.implement_triton(_KERNELS, lambda *args: _unsupported(*args[3:-1]))
expanded_attention.unsupported["cpp"] = lambda *args: "dropout is the reference's" if any(args[8:]) else off_cpu(*args)
packed_attention.implement_triton(_KERNELS, lambda *args: _unsupported(*unpack(*args[:2])))
packed_attention_backward.implement_triton(_KERNELS, lambda *args: _unsupported(*unpack(*args[3:5])))
