"""How several tasks run through one expanded backbone: together behind a shared prefix where that is known to be right,
else one after the other, which is right for every backbone.

Together, all tasks share one stream until a block treats them differently; the backbone's own code then meets more rows
than it was given. Whether it minds cannot be told from shapes. So the first call of its kind is compared, on probe values
in evaluation mode, with every task alone; what is learned then (which tensors come by image, and on which axis) holds
for later calls of the kind, whatever their batch.
"""

import random
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .streams import Expansion, Forward, Layout, apart, hide, repeat_rows, show, together, traced
from .trees import leaves, map_leaves, opaque, structure, tensors


class Call(NamedTuple):
    """What is run for every task."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Any

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)


SHARED_PREFIX = ("auto", True, False)
MOST_TRIES = 3
"""Failed comparisons after which a kind of call is no longer compared: a coincidence of sizes does not come thrice."""


class Leaf(NamedTuple):
    """One tensor of what a call returns."""

    axis: int
    """Where its rows are."""
    is_split: bool
    """Whether it holds the rows of streams; else all tasks share it, as a feature tapped before they part."""


class Way(NamedTuple):
    """How the tasks of one kind of call run."""

    shares: bool
    leaves: tuple[Leaf, ...] = ()
    arguments: Any = None
    """``{(block, argument): batch axis or None}``."""
    num_streams: int = 1
    """How many the forward ended with: one that ends with more has run other blocks."""
    reason: str = ""
    """Why they do not share."""


ONE_BY_ONE = Way(False)


class Ways:
    """What is known of the calls of one caller; they differ by tasks, input structure, and one row or several.

    The caller makes it anew where something else is called: other expansions, another function for features.
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

    def way(self, tasks: tuple[str, ...], call: Call, *, force_eager: bool = False) -> Way:
        """The way for this call, compared now if it is the first of its kind. Inside of traced code: if it is known."""
        settings = [expansion.shared_prefix for expansion in self.expansions]
        if len(tasks) == 1:
            return ONE_BY_ONE
        if not torch.compiler.is_compiling():
            _refuse_caches(call)
        if False in settings:
            return ONE_BY_ONE
        key = (tasks, structure(call[1:], single=True))
        if torch.compiler.is_compiling():
            return self.known.get(key, ONE_BY_ONE)
        if key not in self.known:
            with torch.compiler.set_stance("force_eager") if force_eager else nullcontext():
                way = self._compare(tasks, call, key)
            self.last = way
            if not way.shares:
                self._complain(way.reason, must_share=True in settings)
            return way
        return self.known[key]

    def forget(self, tasks: tuple[str, ...], call: Call) -> None:
        """The next call of this kind is compared again: it met an argument that the first one did not have."""
        self.known.pop((tasks, structure(call[1:], single=True)), None)

    def _compare(self, tasks: tuple[str, ...], call: Call, key: Any) -> Way:
        forward = Forward(self.expansions, probes=True)
        with evaluating(self.owner) as rewind, shown(forward):
            alone: list[Any] = []
            for task in tasks:
                rewind()
                forward.start(together((task,)))
                alone.append(self._unchanging(call))
            rewind()
            forward.start(together(tasks))
            forward.learns = True
            try:
                way = self._compared(call(), alone, tasks, forward)
            except Exception as error:  # whatever the backbone raises when it meets more rows than it was given
                way = Way(False, reason=f"{type(error).__name__}: {error}")
        rows = forward.num_rows
        if way.shares and (forward.distinct or rows in (None, 1)):
            self.known[key] = way
        elif way.shares:  # all images are the same: rows that were mixed up would not be seen
            return Way(False)
        else:
            failed = self._failed.setdefault(key, set())
            failed.add(rows or 0)
            if len(failed) >= MOST_TRIES or not rows:
                self.known[key] = way
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

    def _compared(self, shared: Any, alone: Sequence[Any], tasks: tuple[str, ...], forward: Forward) -> Way:
        if any(structure(output) != structure(shared) for output in alone):
            return Way(False, reason="what it returns has another structure then")
        if (hidden := opaque(shared)) is not None:
            return Way(False, reason=f"what it returns holds a {type(hidden).__name__}, in which nobody sees the rows")
        found: list[Leaf] = []
        for leaf, *own in zip(tensors(shared), *map(tensors, alone), strict=True):
            leaf_way = _leaf(leaf, own, tasks, forward)
            if leaf_way is None:
                shapes = f"{tuple(leaf.shape)} where each task alone gives {tuple(own[0].shape)}"
                return Way(False, reason=f"an output of shape {shapes} is not what the tasks have alone")
            found.append(leaf_way)
        return Way(True, tuple(found), dict(forward.arguments), forward.layout.num_streams)

    def _complain(self, reason: str, must_share: bool) -> None:
        where = f"{type(self.owner).__name__}, whose tasks part at block {first_parting(self.expansions)!r},"
        if must_share:
            raise RuntimeError(f"{where} cannot share its first blocks among tasks as shared_prefix=True asks: {reason}")
        if reason and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{where} runs once for every task instead of sharing its first blocks: {reason}", stacklevel=4
            )


def _refuse_caches(call: Call) -> None:
    for leaf in leaves(call[1:]):
        if any(base.__name__ == "Cache" for base in type(leaf).__mro__):
            raise RuntimeError(
                f"a key-value cache ({type(leaf).__name__}) holds the rows of one task: choose it, by "
                "`with dtme.tasks(backbone, task)`"
            )


def sharing_of(module: nn.Module) -> str:
    """How the last call of several tasks ran them: ``"shared prefix"``, ``"one by one: <reason>"``, or ``"unknown"``.

    Args:
        module: a ``MultiTaskModel`` or an expanded backbone.
    """
    entries = getattr(vars(module).get("_dtme"), "entries", ())
    known = [vars(module).get("_ways"), *(entry.ways for entry in entries)]
    last = next((ways.last for ways in known if ways is not None and ways.last is not None), None)
    if last is None:
        return "unknown"
    return "shared prefix" if last.shares else f"one by one: {last.reason}".removesuffix(": ")


def first_parting(expansions: tuple[Expansion, ...]) -> str:
    return next((block for expansion in expansions for block in expansion.plan.blocks), "")


def _leaf(leaf: Tensor, own: list[Tensor], tasks: tuple[str, ...], forward: Forward) -> Leaf | None:
    """How ``leaf`` holds the tensors that the tasks have alone, if it does."""
    if all(leaf.shape == tensor.shape and same(leaf, tensor) for tensor in own):
        return Leaf(0, False)
    num_rows = forward.num_rows
    axes = [d for d in range(leaf.ndim) if own[0].ndim == leaf.ndim and own[0].shape[d] == num_rows]
    for axis in axes:
        layout = _layout_of(leaf, axis, forward)
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
    tolerance = 0.1 if low else 1e-3 if a.dtype != torch.float64 else 1e-7
    a, b = a.detach().double(), b.detach().double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (a, b))
    return bool((a - b).norm() <= tolerance * b.norm().clamp(min=1e-30))


def _layout_of(leaf: Tensor, axis: int, forward: Forward) -> Layout | None:
    """The streams that ``leaf`` holds: those that the forward had at some block, of as many rows."""
    rows = leaf.shape[axis]
    return next((layout for layout in forward.seen if rows == layout.num_streams * (forward.num_rows or 0)), None)


def rows_of(leaf: Tensor, axis: int, layout: Layout, task: str) -> Tensor:
    rows = leaf.shape[axis] // layout.num_streams
    return leaf.narrow(axis, layout.index(task) * rows, rows)


@contextmanager
def shown(forward: Forward) -> Iterator[None]:
    token = show(forward)
    try:
        yield
    finally:
        hide(token)


# --- running ------------------------------------------------------------------------------------------------------------

_compiled_parts = threading.RLock()
"""Held by a forward some of whose blocks are compiled by themselves: they find its state on the expansion."""

ANY_TASK = ("*",)
"""Stands for the task that ``Forward.task_index`` names: a compiled graph must not know which."""


class Opening:
    """A forward of some tasks, opened for one call: the part that ``torch.compile`` does not see.

    Args:
        expansions: those whose adapters the call will meet.
        has_compiled_parts: whether some of the blocks are compiled by themselves.
        is_compiled: whether what follows is handed to ``torch.compile``.
    """

    def __init__(
        self,
        ways: Ways,
        expansions: tuple[Expansion, ...],
        tasks: tuple[str, ...],
        call: Call,
        *,
        has_compiled_parts: bool,
        is_compiled: bool,
    ) -> None:
        self.ways, self.call, self.asked = ways, call, tasks
        self.tasks, index = tasks, None
        if is_compiled and not torch.is_grad_enabled():
            index = self._task_index(expansions)
        self._exposed = has_compiled_parts and not is_compiled
        self.way = ways.way(tasks, call, force_eager=self._exposed)
        self.forward = Forward(expansions, task_index=index)
        if self._exposed:
            _compiled_parts.acquire()
            for expansion in expansions:
                expansion.traced = self.forward
        self._token = show(self.forward)

    def _task_index(self, expansions: tuple[Expansion, ...]) -> Tensor | None:
        """One task, as a tensor, if all may share one graph."""
        (task, *others), known = self.asked, expansions[0].tasks
        affine = all(expansion.modulator == "affine" and expansion.tasks == known for expansion in expansions)
        if others or not affine or len(known) == 1:
            return None
        self.tasks = ANY_TASK
        device = next((p.device for p in self.ways.owner.parameters()), torch.device("cpu"))
        return torch.tensor([known.index(task)], device=device)

    def compare_again(self) -> None:
        self.ways.forget(self.tasks, self.call)
        self.way = self.ways.way(self.tasks, self.call, force_eager=self._exposed)

    def close(self) -> None:
        hide(self._token)
        if self._exposed:
            for expansion in self.forward.expansions:
                expansion.traced = None
            _compiled_parts.release()



def run(forward: Forward, way: Way, tasks: tuple[str, ...], call: Call) -> dict[str, Any]:
    """``{task: what call returns for it}``; views of one output where the tasks share."""
    with traced(forward):
        if not way.shares:
            return _one_by_one(forward, tasks, call)
        output = _shared(forward, way, tasks, call)
        return {task: _map_split(way, output, forward, lambda x, axis, at, t=task: rows_of(x, axis, at, t)) for task in tasks}


def run_folded(forward: Forward, way: Way, tasks: tuple[str, ...], call: Call) -> Any:
    """What ``call`` returns, its tensors task-major: the rows of all tasks, also where they share them."""
    with traced(forward):
        if len(tasks) == 1:
            return _one_by_one(forward, tasks, call)[tasks[0]]
        if not way.shares:
            return fold(list(_one_by_one(forward, tasks, call).values()))
        output = _shared(forward, way, tasks, call)
        whole = apart(tasks)

        def complete(leaf: Tensor, axis: int, layout: Layout) -> Tensor:
            return repeat_rows(leaf, whole.sources(layout), layout.num_streams, axis)

        folded = _map_split(way, output, forward, complete)
        states = iter(way.leaves)

        def unsplit(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf if next(states).is_split or not leaf.ndim else torch.cat([leaf] * len(tasks))

        return map_leaves(unsplit, folded)


def _one_by_one(forward: Forward, tasks: tuple[str, ...], call: Call) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # every task draws the random numbers that it would draw alone: blocks left out by chance are left out for all
    rewind = rewinder() if len(tasks) > 1 else None
    for task in tasks:
        if rewind is not None:
            rewind()
        forward.start(together((task,)))
        found[task] = call()
    return found


def _shared(forward: Forward, way: Way, tasks: tuple[str, ...], call: Call) -> Any:
    forward.start(together(tasks))
    forward.arguments = way.arguments
    output = call()
    if len(list(tensors(output))) != len(way.leaves) or forward.layout.num_streams > way.num_streams:
        raise UnknownArgument("what the backbone returns has another structure than at its first call")
    return output


def _map_split(way: Way, output: Any, forward: Forward, function: Callable[[Tensor, int, Layout], Tensor]) -> Any:
    """``function(leaf, axis, layout)`` of the leaves that hold streams."""
    places = iter(way.leaves)

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        axis, is_split = next(places)
        if not is_split or forward.num_rows is None:  # no block ran: all of it is shared
            return leaf
        layout = _layout_of(leaf, axis, forward)
        if layout is None:
            raise RuntimeError(
                f"an output of shape {tuple(leaf.shape)} does not hold the rows of {forward.layout.num_streams} task streams of "
                f"{forward.num_rows}"
            )
        return function(leaf, axis, layout)

    return map_leaves(part, output)


def fold(outputs: Sequence[Any]) -> Any:
    """Outputs of one structure as one whose tensors are task-major; what is no tensor and differs becomes None."""
    rest = [iter(list(tensors(output))) for output in outputs]

    def merged(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else None
        parts = [next(others) for others in rest]
        return torch.cat(parts) if leaf.ndim else torch.stack(parts).mean(0)

    return map_leaves(merged, outputs[0])


class UnknownArgument(RuntimeError):
    """A call that shares met a tensor that the first call of its kind did not have: it has to be compared again."""


# --- probing ------------------------------------------------------------------------------------------------------------


def rewinder() -> Callable[[], None] | None:
    """A function that winds the random numbers back to where they are now; None where they cannot be read."""
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return None
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def rewind() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return rewind


@contextmanager
def evaluating(owner: nn.Module) -> Iterator[Callable[[], None]]:
    """Evaluation mode, no gradients; yields a function that winds random numbers back; all is as before afterwards."""
    training = [module for module in owner.modules() if module.training]
    rewind = rewinder() or (lambda: None)
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield rewind
    finally:
        for module in training:
            module.training = True
        rewind()
