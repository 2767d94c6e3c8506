"""Which tasks run, which of them share their tokens, and the one state of a forward that runs.

All tasks share one stream up to the first block that treats them differently. A task that has a module of its own there
has its own stream from that block on, and so have the tasks of a group whose module it is; the others go on sharing.
Streams are folded into the batch, task-major: T streams of B images are T * B rows.

Whoever calls an expanded backbone opens a ``Forward``; the blocks' adapters find it by ``running``. It is seen by the
thread (or asyncio task) that opened it, and gone when it closes. Nothing about a forward is kept on a module.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .expanded import Expansion, alike
from .torch_private import is_compiled, takes_statistics

if TYPE_CHECKING:
    from .block.adapter import BlockAdapter


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


class Run:
    """One run of one block."""

    def __init__(
        self, block: str, before: Layout, after: Layout, forward: "Forward", key: str = "", count: int = 0
    ) -> None:
        self.block, self.before, self.after, self.forward = block, before, after, forward
        self.key, self.count = key, count
        """The block among those of all expansions, and how often it ran in this forward before."""
        self.half: Any = None
        """What the block's first half made already of its input, on its way to the norm and the attention."""
        self.feeds: Callable[[], Tensor | None] | None = None
        """What the block's attention is to be given: its tokens, or what its norm has made of them."""
        self.next: Run | None = None
        """The run of the block behind it, for parts of several blocks that are recomputed together."""

    def repeat(self, tokens: Tensor) -> Tensor:
        """Rows of the streams that come in as rows of those that the block sees."""
        return repeat_rows(tokens, self.after.sources(self.before), self.before.num_streams)


class Forward:
    """The state of one forward of an expanded backbone.

    Args:
        expansions: those whose adapters it is for.
        task_index: (1,) int64, the place among the ``owners`` of an expansion of that of a single stream's task: as a
            tensor, so that one compiled graph serves every task.
        probes: run with made-up modulations and tokens, by which the tasks can be told apart even before training.
    """

    def __init__(
        self, expansions: tuple[Expansion, ...], *, task_index: Tensor | None = None, probes: bool = False
    ) -> None:
        self.expansions, self.task_index, self.probes = expansions, task_index, probes
        self.arguments: dict[tuple[str, int, str], tuple[int | None, int | None]] = {}
        """Of every tensor that a block's run takes beside its tokens: its batch axis, None where it has none, and then
        its first size, which must not change with the batch."""
        self.learns = False
        """Whether ``arguments`` are being found out; else an argument that is not in it is an error."""
        self.closes_at: str | None = None
        """The block that opened it, being called by itself, and closes it."""
        self.attempt = 0
        """How often it was begun anew because of something that its comparison had not met."""
        self.num_named: int | None = None
        """How many rows somebody has named the task of, if all have the same."""
        self.may_thin_out = False
        """Whether ``thinned_out`` names will do for fewer rows."""
        self.thread = None if torch.compiler.is_compiling() else threading.get_ident()

    def start(self, layout: Layout) -> None:
        """Before the backbone runs: its input is one stream, or every row of it one, of ``layout``."""
        self.layout = layout
        self.may_part = not layout.by_row and len(alike(layout.tasks, self.expansions)) > 1
        self.num_rows: int | None = None
        self.runs: dict[str, Run] = {}
        """The last run of every block, by ``key``."""
        self.last: Run | None = None
        self.distinct = False
        self.seen: tuple[Layout, ...] = (layout,)

    def key(self, expansion: Expansion, block: str) -> str:
        """A name for a block of one of several expansions, which may have blocks of the same name."""
        if len(self.expansions) == 1:
            return block
        return f"{next(i for i, one in enumerate(self.expansions) if one is expansion)}/{block}"

    def run_block(self, key: str, block: str, tokens: Tensor, leaving: Mapping[str, str]) -> Run:
        """``block`` is about to run on ``tokens``; the tasks of ``leaving`` have modules there, their owners'."""
        if self.may_thin_out and self.num_rows is None and self.layout.by_row:
            names = thinned_out([task for (task,) in self.layout.streams], tokens.shape[0])
            self.layout = by_row(names) if names else self.layout
        before = self.layout
        after = before.part(leaving) if self.may_part else before
        self._check_rows(block, tokens, before.num_streams)
        if after.num_streams != before.num_streams:
            self.layout, self.seen = after, (*self.seen, after)
        run = Run(block, before, after, self, key, self.runs[key].count + 1 if key in self.runs else 0)
        if not torch.compiler.is_compiling():
            if self.last is not None:
                self.last.next = run
            self.last = run
        self.runs[key] = run
        return run

    def _check_rows(self, block: str, tokens: Tensor, num_streams: int) -> None:
        rows = tokens.shape[0]
        named = num_streams if self.layout.by_row else self.num_named if self.num_rows is None else None
        if named not in (None, rows) and (self.layout.by_row or not rows or not named or named % rows):
            raise RuntimeError(
                f"block {block!r} got {rows} rows, but task_of_row names the tasks of {named}: it names one for every "
                "row that the blocks see"
            )
        if self.num_rows is None:
            self.num_rows = 1 if self.layout.by_row else rows
            if self.probes:
                self.distinct = bool((tokens[1:] != tokens[:1]).any())
        elif self.may_part and rows != self.num_rows * num_streams:
            raise RuntimeError(
                f"block {block!r} got {rows} rows where {num_streams} task streams of {self.num_rows} were expected: "
                "its tokens do not come from the blocks before it"
            )


# --- the forward of this thread ---------------------------------------------------------------------------------------

_forwards: ContextVar[tuple[Forward, ...]] = ContextVar("dtme_forwards", default=())


def running(expansion: Expansion) -> Forward | None:
    """The forward of ``expansion`` that runs in this thread."""
    if torch.compiler.is_compiling():
        return expansion.traced
    for forward in reversed(_forwards.get()):
        if any(known is expansion for known in forward.expansions):
            return forward
    # a larger compiled function, whose graph broke, goes on here
    found = expansion.traced
    return found if found is not None and found.thread in (None, threading.get_ident()) else None


def innermost() -> Forward | None:
    """The forward that was opened last in this thread, of whatever backbone."""
    return next(reversed(_forwards.get()), None)


def show(forward: Forward) -> None:
    """Make ``forward`` the one that runs in this thread, until it is hidden."""
    _forwards.set((*_forwards.get(), forward))


def hide(forward: Forward) -> None:
    # not by a token, which is worth nothing in another asyncio task that inherited what an interrupted one left
    _forwards.set(tuple(one for one in _forwards.get() if one is not forward))


class traced:
    """Inside of traced code: let the adapters find ``forward``. Outside it does nothing."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            for expansion in self.forward.expansions:
                expansion.traced = self.forward

    def __exit__(self, *error: object) -> None:
        if torch.compiler.is_compiling():
            for expansion in self.forward.expansions:
                expansion.traced = None


# --- adapters are what says "expanded" --------------------------------------------------------------------------------


class Survey(NamedTuple):
    """What a forward has to know of the modules that it will meet."""

    adapters: "list[BlockAdapter]"
    has_compiled_parts: bool
    """Whether a part is compiled by itself."""
    is_training: bool
    """Whether any module is in training mode."""
    num_statistics: int
    """How many modules compute with statistics of their batch, as batch norm does unless it is frozen."""
    fingerprint: int
    """Other if any module was replaced."""

    @property
    def mode(self) -> tuple[bool, int]:
        """Calls in another one may do other things with their rows."""
        return self.is_training, self.num_statistics


def survey(module: nn.Module) -> Survey:
    """Look through ``module``, several times as fast as by ``modules()``: every forward asks."""
    found: list[BlockAdapter] = []
    compiled = training = False
    statistics = 0
    seen: dict[int, type] = {}
    waiting: list[nn.Module] = [module]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen[id(module)] = type(module)
        compiled = compiled or is_compiled(module)
        if "is_dtme_adapter" in module.__dict__:
            found.append(module)  # type: ignore[arg-type]
            continue
        training = training or module.training
        statistics += takes_statistics(module)
        if children := module._modules:
            waiting.extend([child for child in reversed(children.values()) if child is not None])
    return Survey(found, compiled, training, statistics, hash(tuple(seen.items())))


def adapters(module: nn.Module) -> "list[BlockAdapter]":
    """All adapters in ``module``, in the order of its children."""
    return survey(module).adapters


def expansions(module: nn.Module) -> tuple[Expansion, ...]:
    """Every expansion that has an adapter in ``module``; one, unless parts of it were expanded by themselves."""
    return expansions_of(adapters(module))


def expansions_of(adapters: "Iterable[BlockAdapter]") -> tuple[Expansion, ...]:
    return tuple({id(adapter.expansion): adapter.expansion for adapter in adapters}.values())


def is_expanded(module: nn.Module) -> bool:
    """Whether ``expand`` gave anything in ``module`` modules of its tasks that are still there."""
    return bool(adapters(module))
