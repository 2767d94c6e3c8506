"""Schemas, shapes, gradient and dispatch of ``torch.ops.dtme.count_conflicts`` and ``projected_dots``."""

from typing import Any

import torch
from torch import Tensor

from ..launch import cannot_run
from ..registry import Operator
from . import reference
from .tiles import MAX_TASKS

Counts = tuple[Tensor, Tensor, Tensor, Tensor]


def _unsupported(grads: Tensor, *_: Any) -> str | None:
    """The kernels keep all tasks in registers, and count tokens in 32 bits."""
    if grads.shape[0] > MAX_TASKS:
        return f"the kernels take {MAX_TASKS} tasks at most, got {grads.shape[0]}"
    if grads.shape[1:-1].numel() >= 2**31 - 2**20:
        return f"the kernels take fewer than 2**31 - 2**20 tokens at a time, got {grads.shape[1:-1].numel()}"
    return cannot_run(grads)


def _count_fake(grads: Tensor, basis: Tensor, rank: list[int], count_zero_gradients: bool = False) -> Counts:
    num_tasks = grads.shape[0]
    spaces = [grads.new_empty((len(rank), num_tasks, num_tasks), dtype=torch.int64) for _ in range(2)]
    valid = grads.new_empty((num_tasks, num_tasks), dtype=torch.int64)
    return spaces[0], spaces[1], valid, grads.new_empty((), dtype=torch.int64)


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


def _backward(call: Any, ctx: Any, grad_range: Tensor, grad_null: Tensor) -> tuple[Tensor, Tensor, None]:
    return *call(grad_range, grad_null, *ctx.saved_tensors, ctx.rank), None


# rank: one or several, increasing; the first two outputs have an axis of ranks in front
count_conflicts = Operator(
    "count_conflicts(Tensor grads, Tensor basis, int[1] rank, bool count_zero_gradients=False)"
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

_KERNELS = f"{__package__}.kernel"
count_conflicts.implement_triton(_KERNELS, _unsupported)
projected_dots.implement_triton(_KERNELS, _unsupported)
projected_dots_backward.implement_triton(_KERNELS, lambda *args: _unsupported(*args[2:]))
