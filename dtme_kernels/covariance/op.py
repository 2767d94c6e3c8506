"""``torch.ops.dtme.token_covariance`` and ``token_covariance_``: schemas, tables, gradient, implementations."""

from typing import Any

import torch
from torch import Tensor

from .. import torch_private
from ..launch import cannot_run
from ..registry import Gradient, Kernel, Operator, differentiable_once
from . import reference

# --- token_covariance ------------------------------------------------------------------------------------------------


def _triton(tokens: Tensor) -> Tensor:
    from .kernel import token_covariance

    return token_covariance(tokens)


def _triton_backward(grad: Tensor, tokens: Tensor) -> Tensor:
    from .kernel import token_covariance_backward

    return token_covariance_backward(grad, tokens)


def _fake(tokens: Tensor) -> Tensor:
    p = tokens.shape[-1]
    return tokens.new_empty((p, p), dtype=torch.promote_types(tokens.dtype, torch.float32))


def _fake_backward(grad: Tensor, tokens: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    return (token_covariance_backward.backward_of(ctx, grad, *ctx.saved_tensors),)


token_covariance_backward = Operator(
    "token_covariance_backward(Tensor grad, Tensor tokens) -> Tensor",
    {"tokens": "... p>=1", "grad": "p p; sums of tokens"},
    reference=reference.token_covariance_backward,
    fake=_fake_backward,
    triton=Kernel(_triton_backward, cannot_run),
    cpp="covariance.cpp",
    gradient=differentiable_once("token_covariance"),
)
token_covariance = Operator(
    "token_covariance(Tensor tokens) -> Tensor",
    {"tokens": "... p>=1"},
    reference=reference.token_covariance,
    fake=_fake,
    triton=Kernel(_triton, cannot_run),
    cpp="covariance.cpp",
    gradient=Gradient(_save, _backward),
)

# --- token_covariance_ -----------------------------------------------------------------------------------------------


def _triton_in_place(accumulator: Tensor, tokens: list[Tensor]) -> None:
    from .kernel import token_covariance_

    token_covariance_(accumulator, tokens)


def _triton_cannot_add(accumulator: Tensor, tokens: list[Tensor]) -> str | None:
    return cannot_run(*tokens) if tokens else None


def _fake_in_place(accumulator: Tensor, tokens: list[Tensor]) -> None:
    return None


def _check_layers(accumulator: Tensor, tokens: list[Tensor]) -> None:
    layers = len(accumulator) if accumulator.dim() == 3 else 1
    if len(tokens) != layers:
        raise ValueError(f"tokens must be a sequence of D = {layers} tensors like accumulator, got {len(tokens)}")
    if accumulator.requires_grad:
        raise ValueError("accumulator must not require grad: it is added to in place")
    if accumulator.is_contiguous():
        return
    reach = 0  # of the axes with smaller strides: from the first to the last element
    for stride, size in sorted(zip(accumulator.stride(), accumulator.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"accumulator must not overlap itself, got strides {accumulator.stride()}")
        reach += (size - 1) * stride


def _apart(accumulator: Tensor, tokens: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Tokens that share memory with the accumulator would change while they are read."""
    return accumulator, [x.clone() if torch_private.are_views_of_one(accumulator, x) else x for x in tokens]


token_covariance_ = Operator(
    "token_covariance_(Tensor(a!) accumulator, Tensor[] tokens) -> ()",
    {"accumulator": "[D] p>=1 p; float32 or float64", "tokens[]": "... p"},
    reference=reference.token_covariance_,
    fake=_fake_in_place,
    triton=Kernel(_triton_in_place, _triton_cannot_add),
    cpp="covariance.cpp",
    rules=_check_layers,
    prepare=_apart,
)
