"""Which tasks share their tokens, and in what order the rows of a batch are theirs.

All tasks share one stream up to the first block that treats them differently. A task that has a module of its own there
has its own stream from that block on, and so have the tasks of a group whose module it is; the others go on sharing.
Streams are folded into the batch, task-major: T streams of B images are T * B rows. Where every row has a task of its
own, each is a stream.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The streams of a batch in the order of their rows."""

    tasks: tuple[str, ...]
    """All tasks that run, in the order they were asked for."""
    streams: tuple[tuple[str, ...], ...]
    """Each stream's tasks."""
    by_row: bool = False
    """Whether every row that goes in is a stream of the one task that it has: none is repeated, none ever parts."""

    def part(self, leaving: Mapping[str, str]) -> "Layout":
        """Every stream split into one for each owner that tasks leave for, ``{task: owner}``, and one of the rest.

        So the tasks of a stream have the same modules in all blocks behind them.
        """
        if not leaving:
            return self
        index = self._indices()
        parts: dict[tuple[int, str | None], list[str]] = {}
        for task in self.tasks:
            parts.setdefault((index[task], leaving.get(task)), []).append(task)
        return Layout(self.tasks, tuple([tuple(tasks) for tasks in parts.values()]))

    def sources(self, before: "Layout") -> list[int]:
        """For every stream, the stream of ``before`` that its tokens come from."""
        if self.by_row:
            return list(range(self.num_streams))
        index = before._indices()
        return [index[stream[0]] for stream in self.streams]

    def _indices(self) -> dict[str, int]:
        return {task: i for i, stream in enumerate(self.streams) for task in stream}

    def index_of(self, task: str) -> int:
        """Where the stream is that ``task`` is in."""
        return next(i for i, stream in enumerate(self.streams) if task in stream)

    def stream_of(self, task: str) -> tuple[str, ...]:
        """The tasks that share the tokens of ``task``."""
        return self.streams[self.index_of(task)]

    @property
    def num_streams(self) -> int:
        return len(self.streams)


def together(tasks: Sequence[str]) -> Layout:
    """One stream that all ``tasks`` share."""
    return Layout(tuple(tasks), (tuple(tasks),))


def apart(tasks: Sequence[str]) -> Layout:
    """A stream for every task."""
    return Layout(tuple(tasks), tuple((task,) for task in tasks))


def by_row(task_of_row: Sequence[str]) -> Layout:
    """A stream for every row, of the task that it has."""
    return Layout(tuple(dict.fromkeys(task_of_row)), tuple([(task,) for task in task_of_row]), True)


def thinned_out(task_of_row: Sequence[str], num_rows: int) -> tuple[str, ...]:
    """Every k-th of the names, where k after each other are the same; none, where that does not make ``num_rows``."""
    every, rest = divmod(len(task_of_row), num_rows or 1)
    some = tuple(task_of_row[::every]) if every > 1 and not rest else ()
    return some if tuple([task for task in some for _ in range(every)]) == tuple(task_of_row) else ()


def repeat_rows(tensor: Tensor, index: Sequence[int], num_streams: int, axis: int = 0) -> Tensor:
    """(num_streams * B, ...) → (len(index) * B, ...), stream ``index[i]`` in place i; itself if nothing moves."""
    if list(index) == list(range(num_streams)):
        return tensor
    if axis:
        return torch.cat([tensor.chunk(num_streams, axis)[i] for i in index], axis)
    streams = unfold(tensor, num_streams)
    if num_streams == 1:
        return streams.expand(len(index), *streams.shape[1:]).flatten(0, 1)
    return torch.cat([streams[i] for i in index])


def unfold(tensor: Tensor, num_streams: int) -> Tensor:
    """(num_streams * B, ...) → (num_streams, B, ...), B may be 0."""
    return tensor.unflatten(0, (num_streams, tensor.shape[0] // num_streams))
