"""Which tasks run, and the one state of a forward that runs.

Whoever calls an expanded backbone opens a ``Forward``; the blocks' adapters find it by ``running``. It is seen by the
thread (or asyncio task) that opened it, and gone when it closes. Nothing about a forward is kept on a module.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .expanded import Expansion, alike
from .layouts import Layout, by_row, repeat_rows, thinned_out
from .torch_private import is_compiled, takes_statistics

if TYPE_CHECKING:
    from .block.adapter import BlockAdapter


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
