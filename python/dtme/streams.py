"""Which tasks run, and which of them share their tokens at a block.

All tasks share one stream up to the first block that treats them differently. A task that has a module of its own there
has its own stream from that block on; the others go on sharing. Streams are folded into the batch, task-major:
T streams of B images are T * B rows (method.md, section 4).
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .plan import ExpansionPlan
from .trees import map_tensors

Layout = tuple[tuple[str, ...], ...]
"""The streams in the order of their rows; each is the tasks that share it."""


def layout(selected: Sequence[str], separated: frozenset[str]) -> Layout:
    """Streams of the ``selected`` tasks once those in ``separated`` have left the shared one."""
    shared = tuple(task for task in selected if task not in separated)
    first = {task: (task,) for task in selected if task in separated} | ({shared[0]: shared} if shared else {})
    return tuple(first[task] for task in selected if task in first)


def sources(before: Layout, after: Layout) -> list[int]:
    """For every stream of ``after``, the stream of ``before`` that its tokens come from."""
    return [next(i for i, stream in enumerate(before) if tasks[0] in stream) for tasks in after]


def repeat_rows(tensor: Tensor, index: Sequence[int], num_streams: int) -> Tensor:
    """(num_streams * B, ...) → (len(index) * B, ...), stream ``index[i]`` in place i; itself if nothing moves."""
    if list(index) == list(range(num_streams)):
        return tensor
    streams = tensor.unflatten(0, (num_streams, -1))
    if num_streams == 1:
        return streams.expand(len(index), *streams.shape[1:]).flatten(0, 1)
    return torch.cat([streams[i] for i in index])


class Streams:
    """The tasks of an expanded backbone, those that run now, and how it was expanded; all its adapters share it."""

    def __init__(self, tasks: Iterable[str], plan: ExpansionPlan, modulator: str, frozen: list[nn.Parameter]) -> None:
        self.tasks = tuple(tasks)
        self.selected = self.tasks
        self.plan, self.modulator, self.frozen = plan, modulator, frozen

    def choose(self, tasks: str | Sequence[str] | None) -> tuple[str, ...]:
        """Validate a user's choice of tasks; None means all."""
        return choose(tasks, self.tasks)

    def current(self, tokens: Tensor, block: str) -> tuple[str, ...]:
        """The tasks whose rows ``tokens``, on their way into ``block``, hold.

        Activation checkpointing runs a block again during the backward pass, when another choice may be in force. The
        choice therefore travels with the block's input, which non-reentrant checkpointing keeps; where it was lost, an
        error is better than the gradients of other tasks.
        """
        if not recomputing():
            self.mark(tokens, self.selected)
            return self.selected
        selected = getattr(tokens, "_dtme_selected", None)
        if selected is None:
            raise RuntimeError(
                f"block {block!r} is recomputed by activation checkpointing, but its tasks are no longer known: "
                "checkpoint every block on its own with use_reentrant=False"
            )
        return selected

    @staticmethod
    def mark(tokens: Tensor, selected: tuple[str, ...]) -> None:
        """Let ``tokens`` remember their tasks; two different choices for one tensor make it forget both."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            known = getattr(tokens, "_dtme_selected", selected)
            tokens._dtme_selected = selected if known == selected else None  # type: ignore[attr-defined]


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def choose(tasks: str | Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """``tasks`` as a tuple of names out of ``known``, in the order asked for."""
    if tasks is None:
        return tuple(known)
    chosen = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    unknown = [task for task in chosen if task not in known]
    if unknown or not chosen or len(set(chosen)) != len(chosen):
        problem = f"unknown task {unknown[0]!r}" if unknown else f"got {list(chosen)}"
        raise ValueError(f"tasks must be one or more different names out of {list(known)}: {problem}")
    return chosen


class tasks:
    """Choose the streams of an expanded backbone that is called directly.

    >>> with dtme.tasks(backbone, ["depth", "normals"]):
    ...     output = backbone(images)                     # 2 * B rows, task-major
    >>> dtme.split(output, ["depth", "normals"])["depth"]  # B rows

    Args:
        backbone: what ``expand`` was given.
        names: a task or a sequence of tasks; the rows of the output follow their order.

    Raises:
        RuntimeError: ``backbone`` is not expanded.
        ValueError: a name is unknown or given twice.
    """

    def __init__(self, backbone: nn.Module, names: str | Sequence[str]) -> None:
        backbone = getattr(backbone, "backbone", backbone)
        streams = getattr(backbone, "_dtme", None)
        if streams is None:
            raise RuntimeError(f"{type(backbone).__name__} is not expanded: call dtme.expand(backbone, plan) first")
        self.streams: Streams = streams
        self.names = streams.choose(names)

    def __enter__(self) -> tuple[str, ...]:
        self.outer = self.streams.selected
        self.streams.selected = self.names
        return self.names

    def __exit__(self, *error: object) -> None:
        self.streams.selected = self.outer


def split(output: Any, tasks: str | Sequence[str]) -> dict[str, Any]:
    """Take an expanded backbone's task-major batch apart.

    Args:
        output: a tensor (K * B, ...), or any nesting of sequences, mappings and model outputs of such tensors.
        tasks: the K names that ran, in the order they were chosen.

    Returns:
        ``{task: output}`` with B rows each; views, nothing is copied.

    Raises:
        ValueError: a tensor's leading size is not a multiple of K.
    """
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)

    def part(index: int, tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] % len(names):
            raise ValueError(f"output of shape {tuple(tensor.shape)} does not hold the rows of {len(names)} tasks")
        return tensor.unflatten(0, (len(names), -1))[index]

    if not names:
        raise ValueError("tasks must name at least one task")
    return {task: map_tensors(partial(part, i), output) for i, task in enumerate(names)}
