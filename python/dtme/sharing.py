"""May several tasks share the first blocks of an expanded backbone? It is found out, once for every kind of call.

Where they share, the backbone's own code meets more rows than it was given. Whether it minds cannot be told from
shapes. So the first call of its kind is compared, on probe values in evaluation mode, with every task alone; what is
learned then (which tensors come by image, and on which axis) holds for later calls of the kind, whatever their batch.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .randomness import evaluating
from .streams import Expansion, Forward, Layout, hide, show, together
from .trees import leaves, opaque, structure, tensors

SHARED_PREFIX = ("auto", True, False)
MOST_TRIES = 3
"""Failed comparisons, at batches of different sizes, after which a kind of call is no longer compared."""


class Call(NamedTuple):
    """What is run for every task."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Any

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)


class Leaf(NamedTuple):
    """One tensor of what a call returns."""

    axis: int
    """Where its rows are."""
    is_split: bool
    """Whether it holds the rows of streams; else all tasks share it, as a feature tapped before they part."""


class Way(NamedTuple):
    """How the tasks of one kind of call run."""

    shares: bool
    reason: str = ""
    """Why they do not share."""
    leaves: tuple[Leaf, ...] = ()
    arguments: Any = None
    """``{(block, argument): batch axis or None}``."""
    num_streams: int = 1
    """How many the forward ended with: one that ends with more has run other blocks."""


ONE_BY_ONE = Way(False)


class UnknownArgument(RuntimeError):
    """A call that shares met a tensor that the first call of its kind did not have: it has to be compared again."""


class Ways:
    """What is known of the calls of one caller, which differ by tasks, by what is given, and by one row or several.

    Args:
        owner: the module that is called.
        expansions: those whose adapters it meets.
        function: what it calls; for other expansions or another function, other ``Ways`` are needed.
    """

    def __init__(self, owner: nn.Module, expansions: tuple[Expansion, ...], function: Any) -> None:
        self.owner, self.expansions, self.function = owner, expansions, function
        self.known: dict[Any, Way] = {}
        self.last: Way | None = None
        """What was found last."""
        self._failed: dict[Any, set[int]] = {}
        self._has_warned = False

    def are_for(self, expansions: tuple[Expansion, ...], function: Any) -> bool:
        same = len(expansions) == len(self.expansions)
        same = same and all(a is b for a, b in zip(expansions, self.expansions, strict=True))
        return same and function is self.function

    def find(self, tasks: tuple[str, ...], call: Call) -> Way:
        """The way for this call if it is known; else the slower one, which is always right."""
        settings = [expansion.shared_prefix for expansion in self.expansions]
        if len(tasks) == 1 or False in settings:
            return ONE_BY_ONE
        return self.known.get(_kind(tasks, call), ONE_BY_ONE)

    def find_out(self, tasks: tuple[str, ...], call: Call, *, force_eager: bool = False) -> Way:
        """The way for this call, which is compared now if it is the first of its kind.

        Args:
            force_eager: parts of the model are compiled, and would be compiled for the comparison too.
        """
        if len(tasks) == 1:
            return ONE_BY_ONE
        _refuse_caches(call)
        settings = [expansion.shared_prefix for expansion in self.expansions]
        if False in settings:
            return ONE_BY_ONE
        kind = _kind(tasks, call)
        if kind not in self.known:
            with torch.compiler.set_stance("force_eager") if force_eager else nullcontext():
                self.last = way = self._compare(tasks, call, kind)
            if not way.shares:
                self._complain(way.reason, must_share=True in settings)
            return way
        return self.known[kind]

    def forget(self, tasks: tuple[str, ...], call: Call) -> None:
        """Compare the next call of this kind again."""
        self.known.pop(_kind(tasks, call), None)

    def _compare(self, tasks: tuple[str, ...], call: Call, kind: Any) -> Way:
        forward = Forward(self.expansions, probes=True)
        with evaluating(self.owner) as rewind, _shown(forward):
            alone: list[Any] = []
            for task in tasks:
                rewind()
                forward.start(together((task,)))
                alone.append(self._unchanging(call))
            rewind()
            forward.start(together(tasks))
            forward.learns = True
            try:
                way = _compared(call(), alone, tasks, forward)
            except Exception as error:  # whatever the backbone raises when it meets more rows than it was given
                way = Way(False, f"{type(error).__name__}: {error}")
        rows = forward.num_rows
        if way.shares and not forward.distinct and rows not in (None, 1):
            return ONE_BY_ONE  # all images are the same: rows that were mixed up would not be seen
        if not way.shares:
            failed = self._failed.setdefault(kind, set())
            failed.add(rows or 0)
            if len(failed) < MOST_TRIES and rows:  # sizes may have coincided
                return way
        self.known[kind] = way
        return way

    def _unchanging(self, call: Call) -> Any:
        inputs = [tensor for tensor in tensors(call[1:]) if not tensor.is_inference()]
        versions = [tensor._version for tensor in inputs]
        output = call()
        if [tensor._version for tensor in inputs] != versions:
            raise RuntimeError(
                f"{type(self.owner).__name__} changes its input in place, so that several tasks cannot read the same: "
                "let it work on a copy"
            )
        return output

    def _complain(self, reason: str, must_share: bool) -> None:
        first = next((block for expansion in self.expansions for block in expansion.plan.blocks), "")
        where = f"{type(self.owner).__name__}, whose tasks part at block {first!r},"
        if must_share:
            raise RuntimeError(
                f"{where} cannot share its first blocks among tasks as shared_prefix=True asks: {reason}"
            )
        if reason and not self._has_warned:
            self._has_warned = True
            message = f"{where} runs once for every task instead of sharing its first blocks: {reason}"
            warnings.warn(message, stacklevel=_caller())


def _caller() -> int:
    """The stack level of whoever called the model, as ``warnings.warn`` counts from the function that calls this."""
    inside = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def _kind(tasks: tuple[str, ...], call: Call) -> Any:
    return tasks, structure(call[1:], single=True)


@contextmanager
def _shown(forward: Forward) -> Iterator[None]:
    show(forward)
    try:
        yield
    finally:
        hide(forward)


def _refuse_caches(call: Call) -> None:
    for leaf in leaves(call[1:]):
        if any(base.__name__ == "Cache" for base in type(leaf).__mro__):
            raise RuntimeError(
                f"a key-value cache ({type(leaf).__name__}) holds the rows of one task: choose it, by "
                "`with dtme.tasks(backbone, task)`"
            )


def sharing_of(module: nn.Module) -> str:
    """How several tasks ran when their call was last compared: ``"shared prefix"``, ``"one by one: <reason>"``.

    Args:
        module: a ``MultiTaskModel`` or an expanded backbone. ``"unknown"`` before its first call of several tasks.
    """
    entries = getattr(vars(module).get("_dtme"), "entries", ())
    known = [vars(module).get("_ways"), *(entry.ways for entry in entries)]
    last = next((ways.last for ways in known if ways is not None and ways.last is not None), None)
    if last is None:
        return "unknown"
    return "shared prefix" if last.shares else f"one by one: {last.reason}".removesuffix(": ")


# --- comparing --------------------------------------------------------------------------------------------------------


def _compared(shared: Any, alone: Sequence[Any], tasks: tuple[str, ...], forward: Forward) -> Way:
    """Whether ``shared`` holds what the tasks have alone, and where."""
    if any(structure(output) != structure(shared) for output in alone):
        return Way(False, "what it returns has another structure then")
    if (hidden := opaque(shared)) is not None:
        return Way(False, f"what it returns holds a {type(hidden).__name__}, in which nobody sees the rows")
    found: list[Leaf] = []
    for leaf, *own in zip(tensors(shared), *map(tensors, alone), strict=True):
        place = _place(leaf, own, tasks, forward)
        if place is None:
            shapes = f"{tuple(leaf.shape)} where each task alone gives {tuple(own[0].shape)}"
            return Way(False, f"an output of shape {shapes} is not what the tasks have alone")
        found.append(place)
    return Way(True, "", tuple(found), dict(forward.arguments), forward.layout.num_streams)


def _place(leaf: Tensor, own: list[Tensor], tasks: tuple[str, ...], forward: Forward) -> Leaf | None:
    """How ``leaf`` holds the tensors that the tasks have alone, if it does."""
    if all(leaf.shape == tensor.shape and same(leaf, tensor) for tensor in own):
        return Leaf(0, False)
    for axis in range(leaf.ndim):
        if own[0].ndim != leaf.ndim or own[0].shape[axis] != forward.num_rows:
            continue
        layout = layout_of(leaf, axis, forward)
        if layout is not None:
            parts = [rows_of(leaf, axis, layout, task) for task in tasks]
            if all(a.shape == b.shape and same(a, b) for a, b in zip(parts, own, strict=True)):
                return Leaf(axis, True)
    return None


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one computation in different batches are the same, far from what a wrong row would be."""
    if not (a.is_floating_point() or a.is_complex()):
        return a.numel() == 0 or (a == b).double().mean().item() > 0.95
    low = torch.is_autocast_enabled(a.device.type) or a.dtype.itemsize < 4
    tolerance = 0.1 if low else 1e-3 if a.dtype != torch.float64 else 1e-6
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.detach().to(wide), b.detach().to(wide)
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (torch.where(x.isfinite(), x, torch.zeros_like(x)) for x in (a, b))
    return bool((a - b).norm() <= tolerance * b.norm().clamp(min=1e-30))


def layout_of(leaf: Tensor, axis: int, forward: Forward) -> Layout | None:
    """The streams that ``leaf`` holds: those that the forward had at some block, of as many rows."""
    rows = leaf.shape[axis]
    return next((layout for layout in forward.seen if rows == layout.num_streams * (forward.num_rows or 0)), None)


def rows_of(leaf: Tensor, axis: int, layout: Layout, task: str) -> Tensor:
    """The rows of ``task``; a view."""
    rows = leaf.shape[axis] // layout.num_streams
    return leaf.narrow(axis, layout.index_of(task) * rows, rows)
