"""``torch.ops.dtme.modulate`` and ``modulate_layer_norm``: schemas, tables, gradients, implementations."""

from typing import Any

import torch
from torch import Tensor

from ..launch import cannot_run
from ..registry import Gradient, Kernel, Operator, differentiable_once, without_last_output
from . import reference

MOST_CHANNELS = 4096  # a row of tokens, and the sums of one stream's gradients, in the registers of one program

TABLE = {"tokens": "[T] B N p>=1", "weight": "T>=1 p", "bias": "T p; like weight"}
NORM_TABLE = TABLE | {"norm_weight": "p", "norm_bias": "p; like norm_weight"}


def _triton_cannot_run(*args: Any) -> str | None:
    tensors = [x for x in args if isinstance(x, Tensor)]
    channels = tensors[0].shape[-1]
    if channels > MOST_CHANNELS:
        return f"the kernels take {MOST_CHANNELS} channels at most, got {channels}"
    return cannot_run(*tensors)


# --- modulate --------------------------------------------------------------------------------------------------------


def _triton(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from .kernel import modulate

    return modulate(tokens, weight, bias)


def _triton_backward(grad: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from .kernel import modulate_backward

    return modulate_backward(grad, tokens, weight)


def _fake(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return tokens.new_empty((weight.shape[0], *tokens.shape[-3:]))


def _fake_backward(grad: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    tokens, weight, _ = inputs
    ctx.save_for_backward(tokens, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return tuple(modulate_backward.backward_of(ctx, grad, *ctx.saved_tensors))


modulate_backward = Operator(
    "modulate_backward(Tensor grad, Tensor tokens, Tensor weight) -> (Tensor, Tensor, Tensor)",
    {"tokens": "[T] B N p>=1", "weight": "T>=1 p", "grad": "T B N p; like tokens"},
    reference=reference.modulate_backward,
    fake=_fake_backward,
    triton=Kernel(_triton_backward, _triton_cannot_run),
    cpp="modulation.cpp",
    gradient=differentiable_once("modulate"),
)
modulate = Operator(
    "modulate(Tensor tokens, Tensor weight, Tensor bias) -> Tensor",
    TABLE,
    reference=reference.modulate,
    fake=_fake,
    triton=Kernel(_triton, _triton_cannot_run),
    cpp="modulation.cpp",
    gradient=Gradient(_save, _backward),
)

# --- modulate_layer_norm ---------------------------------------------------------------------------------------------


def _triton_norm(
    tokens: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernel import modulate_layer_norm

    return modulate_layer_norm(tokens, weight, bias, norm_weight, norm_bias, eps)


def _triton_norm_backward(*args: Any) -> tuple[Tensor, ...]:
    from .kernel import modulate_layer_norm_backward

    return modulate_layer_norm_backward(*args)


def _fake_norm(
    tokens: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    modulated = _fake(tokens, weight, bias)
    return modulated, torch.empty_like(modulated), modulated.new_empty((2, *modulated.shape[:-1]), dtype=torch.float32)


def _fake_norm_backward(*args: Any) -> tuple[Tensor, ...]:
    _, _, _, tokens, weight, bias, norm_weight, _ = args
    return tuple(x.new_empty(x.shape) for x in (tokens, weight, bias, norm_weight, norm_weight))


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, weight, bias, norm_weight, _, ctx.eps = inputs
    _, _, statistics = output
    ctx.save_for_backward(statistics, tokens, weight, bias, norm_weight)
    ctx.mark_non_differentiable(statistics)


def _backward_norm(ctx: Any, grad_modulated: Tensor, grad_normalized: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *modulate_layer_norm_backward.backward_of(
        ctx, grad_modulated, grad_normalized, *ctx.saved_tensors, ctx.eps
    ), None


# statistics: mean and 1 / std of every row and stream, for a kernel's own backward; where the backward forms them again
# itself, in the reference and in C++, they say nothing
ARGUMENTS = "Tensor tokens, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps=1e-06"
modulate_layer_norm_backward = Operator(
    "modulate_layer_norm_backward(Tensor grad_modulated, Tensor grad_normalized, Tensor statistics, Tensor tokens,"
    " Tensor weight, Tensor bias, Tensor norm_weight, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    TABLE
    | {
        "norm_weight": "p",
        "grad_modulated": "T B N p; like tokens",
        "grad_normalized": "T B N p; like tokens",
        "statistics": "2 T B N; float32 or float64",
    },
    reference=reference.modulate_layer_norm_backward,
    fake=_fake_norm_backward,
    triton=Kernel(_triton_norm_backward, _triton_cannot_run),
    cpp="modulation.cpp",
    gradient=differentiable_once("modulate_layer_norm"),
)
modulate_layer_norm = Operator(
    f"modulate_layer_norm_forward({ARGUMENTS}) -> (Tensor modulated, Tensor normalized, Tensor statistics)",
    NORM_TABLE,
    reference=reference.modulate_layer_norm_forward,
    fake=_fake_norm,
    triton=Kernel(_triton_norm, _triton_cannot_run),
    cpp="modulation.cpp",
    gradient=Gradient(_save_norm, _backward_norm),
    public="modulate_layer_norm",
)
without_last_output(f"modulate_layer_norm({ARGUMENTS}) -> (Tensor modulated, Tensor normalized)", modulate_layer_norm)
