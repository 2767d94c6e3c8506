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
from .trees import map_tensors, tensors

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
    streams = unfold(tensor, num_streams)
    if num_streams == 1:
        return streams.expand(len(index), *streams.shape[1:]).flatten(0, 1)
    return torch.cat([streams[i] for i in index])


def unfold(tensor: Tensor, num_streams: int) -> Tensor:
    """(num_streams * B, ...) → (num_streams, B, ...), B may be 0."""
    return tensor.unflatten(0, (num_streams, tensor.shape[0] // num_streams))


class Streams:
    """The tasks of an expanded backbone, those that run now, and how it was expanded; all its adapters share it."""

    def __init__(self, tasks: Iterable[str], plan: ExpansionPlan, modulator: str, frozen: list[str]) -> None:
        self.tasks = tuple(tasks)
        self.selected = self.tasks
        self.plan, self.modulator, self.frozen = plan, modulator, frozen
        self.start()

    def start(self) -> None:
        """Before a forward: no block has run, and the rows of a stream are not known yet."""
        self.last: str | None = None
        self.num_rows: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy made while a choice is in force is not bound by it
        return {**self.__dict__, "selected": self.tasks, "last": None, "num_rows": None}

    def follow(self, block: str, previous: str | None) -> None:
        """Every block runs once a forward, in one order: otherwise its rows are not the streams they should be."""
        if self.last != previous:
            ran, self.last = self.last, None
            raise RuntimeError(
                f"block {block!r} must run once a forward, after {previous!r}, but it ran after {ran!r} "
                "(if a forward was interrupted before this one, call again)"
            )
        self.last = block

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
    if not isinstance(tasks, (str, Sequence)):
        raise TypeError(f"tasks must be a name or a sequence of names, got {type(tasks).__name__}")
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
        backbone = backbone if hasattr(backbone, "_dtme") else getattr(backbone, "backbone", backbone)
        streams = getattr(backbone, "_dtme", None)
        if streams is None:
            raise RuntimeError(f"{type(backbone).__name__} is not expanded: call dtme.expand(backbone, plan) first")
        self.streams: Streams = streams
        self.names = choose(names, streams.tasks)
        self.outer: list[tuple[str, ...]] = []

    def __enter__(self) -> tuple[str, ...]:
        self.outer.append(self.streams.selected)
        self.streams.selected = self.names
        self.streams.start()
        return self.names

    def __exit__(self, *error: object) -> None:
        self.streams.selected = self.outer.pop()


def split(output: Any, tasks: str | Sequence[str]) -> dict[str, Any]:
    """Take an expanded backbone's task-major batch apart.

    Args:
        output: a tensor (K * B, ...), or any nesting of sequences, mappings and model outputs of such tensors. A tensor
            of B rows beside others of K * B was made before the streams parted, and belongs to every task.
        tasks: the K names that ran, in the order they were chosen.

    Returns:
        ``{task: output}`` with B rows each; views, nothing is copied.

    Raises:
        ValueError: a tensor has neither K * B nor B rows.
    """
    names = choose(tasks, (tasks,) if isinstance(tasks, str) else tuple(tasks or ()))
    sizes = [tensor.shape[0] for tensor in tensors(output) if tensor.ndim]
    num_rows, rest = divmod(max(sizes, default=0), len(names))

    def part(index: int, tensor: Tensor) -> Tensor:
        rows = tensor.shape[0] if tensor.ndim else 0
        if rest or rows not in (num_rows, num_rows * len(names)):
            raise ValueError(f"output of shape {tuple(tensor.shape)} does not hold the rows of {len(names)} tasks")
        return tensor if rows == num_rows else tensor[index * num_rows : (index + 1) * num_rows]

    return {task: map_tensors(partial(part, i), output) for i, task in enumerate(names)}
