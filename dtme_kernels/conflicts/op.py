"""``torch.ops.dtme.count_conflicts`` and ``projected_dots``: schemas, tables, gradient, implementations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch import cannot_run
from ..registry import Gradient, Kernel, Operator, differentiable_once
from . import reference
from .tiles import MAX_TASKS

Counts = tuple[Tensor, Tensor, Tensor, Tensor]

TABLE = {"grads": "K>=2 *tokens p>=2", "basis": "p p"}


def _triton_cannot_run(grads: Tensor, *others: Any) -> str | None:
    """The kernels keep all tasks in registers, and count tokens in 32 bits."""
    if grads.shape[0] > MAX_TASKS:
        return f"the kernels take {MAX_TASKS} tasks at most, got {grads.shape[0]}"
    if grads.shape[1:-1].numel() >= 2**31 - 2**20:
        return f"the kernels take fewer than 2**31 - 2**20 tokens at a time, got {grads.shape[1:-1].numel()}"
    return cannot_run(grads)


# --- count_conflicts -------------------------------------------------------------------------------------------------


def _triton_count(grads: Tensor, basis: Tensor, rank: Sequence[int], count_zero_gradients: bool) -> Counts:
    from .kernel import count_conflicts

    return count_conflicts(grads, basis, rank, count_zero_gradients)


def _fake_count(grads: Tensor, basis: Tensor, rank: list[int], count_zero_gradients: bool) -> Counts:
    num_tasks = grads.shape[0]
    spaces = [grads.new_empty((len(rank), num_tasks, num_tasks), dtype=torch.int64) for _ in range(2)]
    valid = grads.new_empty((num_tasks, num_tasks), dtype=torch.int64)
    return spaces[0], spaces[1], valid, grads.new_empty((), dtype=torch.int64)


def _check_ranks(grads: Tensor, basis: Tensor, rank: Sequence[int], *others: Any) -> None:
    p = basis.shape[0]
    least = 1
    for m in rank:
        if not least <= m <= p - 1:
            wanted, got = ("be in", rank[0]) if len(rank) == 1 else ("increase within", list(rank))
            raise ValueError(f"rank must {wanted} [1, p-1] = [1, {p - 1}], got {got}")
        least = m + 1
    if not rank:
        raise ValueError("rank must hold at least one rank, got none")


# rank: one or several, increasing; the first two outputs have an axis of ranks in front
count_conflicts = Operator(
    "count_conflicts(Tensor grads, Tensor basis, int[1] rank, bool count_zero_gradients=False)"
    " -> (Tensor range, Tensor null, Tensor valid, Tensor nonfinite)",
    TABLE,
    reference=reference.count_conflicts,
    fake=_fake_count,
    triton=Kernel(_triton_count, _triton_cannot_run),
    cpp="conflicts.cpp",
    rules=_check_ranks,
)

# --- projected_dots --------------------------------------------------------------------------------------------------


def _triton_dots(grads: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    from .kernel import projected_dots

    return projected_dots(grads, basis, rank)


def _triton_dots_backward(
    grad_range: Tensor, grad_null: Tensor, grads: Tensor, basis: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    from .kernel import projected_dots_backward

    return projected_dots_backward(grad_range, grad_null, grads, basis, rank)


def _triton_cannot_run_backward(grad_range: Tensor, grad_null: Tensor, *inputs: Any) -> str | None:
    return _triton_cannot_run(*inputs)


def _fake_dots(grads: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    num_tasks, *tokens, _ = grads.shape
    shape = (num_tasks * (num_tasks - 1) // 2, *tokens)
    wide = torch.promote_types(grads.dtype, torch.float32)
    return grads.new_empty(shape, dtype=wide), grads.new_empty(shape, dtype=wide)


def _fake_dots_backward(
    grad_range: Tensor, grad_null: Tensor, grads: Tensor, basis: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    return grads.new_empty(grads.shape), basis.new_empty(basis.shape)


def _check_rank(grads: Tensor, basis: Tensor, rank: int) -> None:
    _check_ranks(grads, basis, [rank])


def _check_rank_backward(grad_range: Tensor, grad_null: Tensor, *inputs: Any) -> None:
    _check_rank(*inputs)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    grads, basis, ctx.rank = inputs
    ctx.save_for_backward(grads, basis)


def _backward(ctx: Any, grad_range: Tensor, grad_null: Tensor) -> tuple[Tensor, Tensor, None]:
    return *projected_dots_backward.backward_of(ctx, grad_range, grad_null, *ctx.saved_tensors, ctx.rank), None


projected_dots_backward = Operator(
    "projected_dots_backward(Tensor grad_range, Tensor grad_null, Tensor grads, Tensor basis, int rank)"
    " -> (Tensor, Tensor)",
    TABLE | {"grad_range": "pairs(K) *tokens; sums of grads", "grad_null": "pairs(K) *tokens; sums of grads"},
    reference=reference.projected_dots_backward,
    fake=_fake_dots_backward,
    triton=Kernel(_triton_dots_backward, _triton_cannot_run_backward),
    cpp="projected_dots.cpp",
    rules=_check_rank_backward,
    gradient=differentiable_once("projected_dots"),
)
projected_dots = Operator(
    "projected_dots(Tensor grads, Tensor basis, int rank) -> (Tensor, Tensor)",
    TABLE,
    reference=reference.projected_dots,
    fake=_fake_dots,
    triton=Kernel(_triton_dots, _triton_cannot_run),
    cpp="projected_dots.cpp",
    rules=_check_rank,
    gradient=Gradient(_save, _backward),
)
