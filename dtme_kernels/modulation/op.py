"""Schemas, shapes, gradients and dispatch of ``torch.ops.dtme.modulate`` and ``modulate_layer_norm``."""

from typing import Any

import torch
from torch import Tensor

from ..launch import cannot_run
from ..registry import Operator, library
from . import reference

MOST_CHANNELS = 4096  # a row of tokens, and the sums of one stream's gradients, in the registers of one program


def _modulate_fake(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return tokens.new_empty((weight.shape[0], *tokens.shape[-3:]))


def _modulate_backward_fake(grad: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _modulate_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    tokens, weight, _ = inputs
    ctx.save_for_backward(tokens, weight)


def _modulate_backward(call: Any, ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return call(grad, *ctx.saved_tensors)


modulate = Operator("modulate(Tensor tokens, Tensor weight, Tensor bias) -> Tensor", reference.modulate, _modulate_fake)
modulate_backward = Operator(
    "modulate_backward(Tensor grad, Tensor tokens, Tensor weight) -> (Tensor, Tensor, Tensor)",
    reference.modulate_backward,
    _modulate_backward_fake,
)
modulate.differentiate(_modulate_setup, _modulate_backward, once=modulate_backward)


def _norm_fake(
    tokens: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    modulated = _modulate_fake(tokens, weight, bias)
    return modulated, torch.empty_like(modulated), modulated.new_empty((2, *modulated.shape[:-1]), dtype=torch.float32)


def _norm_backward_fake(
    grad_modulated: Tensor,
    grad_normalized: Tensor,
    statistics: Tensor,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (tokens, weight, bias, norm_weight, norm_weight))


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, weight, bias, norm_weight, _, ctx.eps = inputs
    ctx.save_for_backward(output[2], tokens, weight, bias, norm_weight)
    ctx.mark_non_differentiable(output[2])


def _norm_backward(
    call: Any, ctx: Any, grad_modulated: Tensor, grad_normalized: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    grads = call(grad_modulated, grad_normalized, *ctx.saved_tensors, ctx.eps)
    return *grads, None


# statistics: mean and 1 / std of every row and stream, for a kernel's own backward; where the backward forms them again
# itself, in the reference and in C++, they are zeros
_NORM_ARGUMENTS = "(Tensor tokens, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps=1e-06)"
modulate_layer_norm = Operator(
    f"modulate_layer_norm_forward{_NORM_ARGUMENTS} -> (Tensor modulated, Tensor normalized, Tensor statistics)",
    reference.modulate_layer_norm_forward,
    _norm_fake,
    public="modulate_layer_norm",
)
modulate_layer_norm_backward = Operator(
    "modulate_layer_norm_backward(Tensor grad_modulated, Tensor grad_normalized, Tensor statistics, Tensor tokens,"
    " Tensor weight, Tensor bias, Tensor norm_weight, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.modulate_layer_norm_backward,
    _norm_backward_fake,
)
modulate_layer_norm.differentiate(_norm_setup, _norm_backward, once=modulate_layer_norm_backward)
library.define(f"modulate_layer_norm{_NORM_ARGUMENTS} -> (Tensor modulated, Tensor normalized)")
library.impl("modulate_layer_norm", lambda *args: modulate_layer_norm.overload(*args)[:2], "CompositeImplicitAutograd")


def _unsupported(tokens: Tensor, *others: Any) -> str | None:
    if tokens.shape[-1] > MOST_CHANNELS:
        return f"the kernels take {MOST_CHANNELS} channels at most, got {tokens.shape[-1]}"
    return cannot_run(tokens, *(x for x in others if isinstance(x, Tensor)))


_KERNELS = f"{__package__}.kernel"
for _operator, _first in (
    (modulate, 0),
    (modulate_layer_norm, 0),
    (modulate_backward, 1),
    (modulate_layer_norm_backward, 2),
):
    _operator.implement_triton(_KERNELS, lambda *args, first=_first: _unsupported(*args[first:]))
