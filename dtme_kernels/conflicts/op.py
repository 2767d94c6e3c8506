"""Schemas, shapes, gradient and dispatch of ``torch.ops.dtme.count_conflicts`` and ``projected_dots``."""

from typing import Any

import torch
from torch import Tensor

from ..registry import Operator
from . import reference


def _count_fake(
    grads: Tensor, basis: Tensor, rank: int, count_zero_gradients: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tasks = grads.shape[0]
    range_, null, valid = (grads.new_empty((num_tasks, num_tasks), dtype=torch.int64) for _ in range(3))
    return range_, null, valid, grads.new_empty((), dtype=torch.int64)


def _dots_fake(grads: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    num_tasks, *tokens, _ = grads.shape
    shape = (num_tasks * (num_tasks - 1) // 2, *tokens)
    wide = torch.promote_types(grads.dtype, torch.float32)
    return grads.new_empty(shape, dtype=wide), grads.new_empty(shape, dtype=wide)


def _dots_backward_fake(
    grad_range: Tensor, grad_null: Tensor, grads: Tensor, basis: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    return grads.new_empty(grads.shape), basis.new_empty(basis.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    grads, basis, ctx.rank = inputs
    ctx.save_for_backward(grads, basis)


def _backward(ctx: Any, grad_range: Tensor, grad_null: Tensor) -> tuple[Tensor, Tensor, None]:
    return *projected_dots_backward.overload(grad_range, grad_null, *ctx.saved_tensors, ctx.rank), None


count_conflicts = Operator(
    "count_conflicts(Tensor grads, Tensor basis, int rank, bool count_zero_gradients=False)"
    " -> (Tensor range, Tensor null, Tensor valid, Tensor nonfinite)",
    reference.count_conflicts,
    _count_fake,
)
projected_dots = Operator(
    "projected_dots(Tensor grads, Tensor basis, int rank) -> (Tensor, Tensor)", reference.projected_dots, _dots_fake
)
projected_dots_backward = Operator(
    "projected_dots_backward(Tensor grad_range, Tensor grad_null, Tensor grads, Tensor basis, int rank)"
    " -> (Tensor, Tensor)",
    reference.projected_dots_backward,
    _dots_backward_fake,
)
projected_dots.differentiate(_setup, _backward, once=projected_dots_backward)
