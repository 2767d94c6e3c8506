"""May several tasks share the first blocks of an expanded backbone? It is found out, once for every kind of call.

Where they share, the backbone's own code meets more rows than it was given. Whether it minds cannot be told from
shapes. So the first call of its kind is compared, on probe values, with every task alone; what is learned
then (which tensors come by image, and on which axis) holds for later calls of the kind, whatever their batch.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .caches import caches_in
from .expanded import Expansion, alike
from .layouts import Layout, together
from .randomness import left_as_it_was, random_state, was_drawn
from .sharded import in_step
from .streams import Forward, Survey, hide, show
from .torch_private import takes_statistics
from .trees import fresh, opaque, structure, tensors

SHARED_PREFIX = ("auto", True, False)
MOST_KINDS = 64
"""A kind of call is compared once; what is of another kind every time, a counter among its options say, is not."""
MOST_TRIES = 3
"""Failed comparisons, at batches of different sizes, after which a kind of call is no longer compared."""


class Call(NamedTuple):
    """What is run for every task."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Any

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    def on_fresh_inputs(self) -> Any:
        """Call it so that the next call finds the same inputs; RuntimeError where it writes over a tensor of them."""
        inputs = [tensor for tensor in tensors(self[1:]) if not tensor.is_inference()]
        versions = [tensor._version for tensor in inputs]
        output = self.function(*fresh(self.args), **fresh(self.kwargs))
        if [tensor._version for tensor in inputs] != versions:
            raise RuntimeError(
                "the backbone, or the function for features, changes its input in place, so that several tasks cannot "
                "read the same: let it work on a copy"
            )
        return output


class Leaf(NamedTuple):
    """One tensor of what a call returns."""

    axis: int | None
    """Where its rows are; None for what has none, a table say."""
    is_split: bool
    """Whether it holds the rows of streams; else all tasks share it, as a feature tapped before they part."""


class Way(NamedTuple):
    """How the tasks of one kind of call run."""

    shares: bool
    reason: str = ""
    """Why they do not share."""
    leaves: tuple[Leaf, ...] = ()
    arguments: Any = None
    """``Forward.arguments``."""
    num_streams: int = 1
    """How many the forward ended with: one that ends with more has run other blocks."""
    num_rows: int = 0
    """Of the batch that was compared; 0 where no block ran at all, so that nothing differs between tasks."""


ONE_BY_ONE = Way(False)


class UnknownArgument(RuntimeError):
    """A call that shares met a tensor that the first call of its kind did not have: it has to be compared again."""


class Caller:
    """A module that is called again and again, of whose calls something is known.

    Args:
        owner: the module that is called.
        expansions: those whose adapters it meets.
        function: what it calls; for other expansions or another function, another ``Caller`` is needed.
    """

    def __init__(self, owner: nn.Module, expansions: tuple[Expansion, ...], function: Any) -> None:
        self.owner, self.expansions, self.function = owner, expansions, function
        self._fingerprint: int | None = None
        self._has_warned = False

    def are_for(self, expansions: tuple[Expansion, ...], function: Any) -> bool:
        same = len(expansions) == len(self.expansions)
        same = same and all(a is b for a, b in zip(expansions, self.expansions, strict=True))
        return same and function is self.function


class Ways(Caller):
    """What is known of the calls of one caller, which differ by tasks, by what is given, and by one row or several."""

    def __init__(self, owner: nn.Module, expansions: tuple[Expansion, ...], function: Any) -> None:
        super().__init__(owner, expansions, function)
        self.known: dict[Any, Way] = {}
        self.last: Way | None = None
        """What was found last."""
        self._failed: dict[Any, list[int]] = {}
        self._before: dict[Any, Any] = {}
        self._largest: dict[Any, int] = {}
        """Rows of the input that each kind was compared with, where ranks have to compare together."""

    def find(self, tasks: tuple[str, ...], call: Call, state: Survey) -> Way:
        """The way for this call if it is known; else the slower one, which is always right."""
        if len(alike(tasks, self.expansions)) == 1 or self._never_shares():
            return ONE_BY_ONE
        return self.known.get(self._kind(tasks, call, state), ONE_BY_ONE)

    def find_out(
        self, tasks: tuple[str, ...], call: Call, state: Survey, *, mesh: Any = None, force_eager: bool = False
    ) -> Way:
        """The way for this call, which is compared now if it is the first of its kind.

        Args:
            state: of what is called; nothing is known any more once one of its modules was replaced.
            mesh: of the processes that share the weights, which all find it out together.
            force_eager: parts of the model are compiled, and would be compiled for the comparison too.
        """
        if state.fingerprint != self._fingerprint:
            self.known.clear()
            self._failed.clear()
            self._before.clear()
            self._fingerprint = state.fingerprint
        is_one_stream = len(alike(tasks, self.expansions)) == 1  # one run, which is right for every backbone
        may_share = not is_one_stream and not self._never_shares()
        kind = self._kind(tasks, call, state) if may_share else None
        is_new = may_share and (kind not in self.known or (mesh is not None and self._is_larger(kind, call)))
        if mesh is not None:
            is_new = in_step(mesh, tasks, is_new)  # a comparison is more forwards, for which all ranks have to be there
        if len(tasks) == 1:
            return ONE_BY_ONE
        if is_one_stream:
            self.last = self.last or Way(True)
            return ONE_BY_ONE
        _refuse_caches(call)
        if not may_share:
            self.last = Way(False, "shared_prefix=False")
            return ONE_BY_ONE
        if not is_new:
            return self.known[kind]
        # on a rank in training, a comparison begins with one more forward: so in the mode of all
        is_training = state.is_training if mesh is None else in_step(mesh, tasks, state.is_training)
        with torch.compiler.set_stance("force_eager") if force_eager else nullcontext():
            self.last = way = self._judge(tasks, call, kind, is_training)
        if mesh is not None:
            if in_step(mesh, tasks, not way.shares) and way.shares:
                self.known.pop(kind, None)
                self.last = way = Way(False, way.reason or "on another rank it cannot")
            self._largest[kind] = _rows_in(call)
        if not way.shares:
            self._complain(way.reason)
        return way

    def forget(self, tasks: tuple[str, ...], call: Call, state: Survey) -> None:
        """Compare the next call of this kind again, beginning from what is known of its blocks' arguments."""
        kind = self._kind(tasks, call, state)
        if (way := self.known.pop(kind, None)) is not None:
            self._before[kind] = way.arguments

    def _kind(self, tasks: tuple[str, ...], call: Call, state: Survey) -> Any:
        """Calls of other tasks that part in the same way are of one kind."""
        return tuple(alike(tasks, self.expansions)), state.mode, structure(call[1:], single=True)

    def _is_larger(self, kind: Any, call: Call) -> bool:
        return _rows_in(call) > self._largest.get(kind, 0)

    def _never_shares(self) -> bool:
        return any(expansion.shared_prefix is False for expansion in self.expansions)

    def _judge(self, tasks: tuple[str, ...], call: Call, kind: Any, is_training: bool) -> Way:
        if (hidden := opaque(call[1:])) is not None:
            return Way(False, f"its input holds a {type(hidden).__name__}, into which nobody sees")
        if len(self.known) >= MOST_KINDS:
            return Way(False, f"there are more than {MOST_KINDS} kinds of calls")
        comparison = Comparison(self.owner, self.expansions, tasks, call, is_training)
        comparison.forward.arguments = dict(self._before.get(kind) or {})
        way = comparison.way()
        rows = comparison.forward.num_rows
        if way.shares and not comparison.forward.distinct and rows not in (None, 1):
            return ONE_BY_ONE  # all images are the same: rows that were mixed up would not be seen
        if not way.shares:
            failed = self._failed.setdefault(kind, [])
            failed.append(rows or 0)
            # sizes may have coincided, which another batch, of another size, will show
            if len(set(failed)) == len(failed) < MOST_TRIES and rows and not comparison.mixed:
                return way
        self.known[kind] = way
        return way

    def _complain(self, reason: str) -> None:
        first = next((block for expansion in self.expansions for block in expansion.plan.blocks), "")
        where = f"{type(self.owner).__name__}, whose tasks part at block {first!r},"
        if any(expansion.shared_prefix is True for expansion in self.expansions):
            raise RuntimeError(
                f"{where} cannot share its first blocks among tasks as shared_prefix=True asks: {reason}"
            )
        if reason and not self._has_warned:
            self._has_warned = True
            message = f"{where} runs once for every task instead of sharing its first blocks: {reason}"
            warnings.warn(message, stacklevel=caller_level())


def caller_level() -> int:
    """The stack level of whoever called the model, as ``warnings.warn`` counts from the function that calls this."""
    inside = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def shown(forward: Forward) -> Iterator[None]:
    show(forward)
    try:
        yield
    finally:
        hide(forward)


def _rows_in(call: Call) -> int:
    """A larger batch is compared anew; known before it runs, so that all ranks can do so together."""
    return max((tensor.shape[0] for tensor in tensors(call[1:]) if tensor.ndim), default=0)


def _refuse_caches(call: Call) -> None:
    for cache in caches_in(call[1:]):
        raise RuntimeError(
            f"a key-value cache ({type(cache).__name__}) holds the rows of one task: choose it, by "
            "`with dtme.tasks(backbone, task)`"
        )


def sharing_of(module: nn.Module) -> str:
    """How several tasks ran when their call was last compared: ``"shared prefix"``, ``"one by one: <reason>"``.

    Args:
        module: a ``MultiTaskModel`` or an expanded backbone. ``"unknown"`` before its first call of several tasks.
    """
    known: list[Ways | None] = []
    for part in module.modules():
        entries = getattr(vars(part).get("_dtme"), "entries", ())
        known += [vars(part).get("_ways"), *(entry.ways for entry in entries)]
    last = next((ways.last for ways in known if ways is not None and ways.last is not None), None)
    if last is None:
        return "unknown"
    return "shared prefix" if last.shares else f"one by one: {last.reason}".removesuffix(": ")


# --- comparing --------------------------------------------------------------------------------------------------------


class Comparison:
    """One call of all tasks together against each task alone, on probe values and without gradients.

    One task stands for all that no block tells apart: they are in one stream.

    In training mode if the model draws no random numbers there, else in evaluation mode; statistics of the batch, which
    the rows of all tasks would share, are noticed in either.
    """

    def __init__(
        self, owner: nn.Module, expansions: tuple[Expansion, ...], tasks: tuple[str, ...], call: Call, training: bool
    ) -> None:
        self.owner, self.call = owner, call
        self.tasks = tuple([first for first, *_ in alike(tasks, expansions).values()])
        self.forward = Forward(expansions, probes=True)
        self.training = training and not self._draws()
        self.is_low = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in owner.parameters())
        self.mixed: list[str] = []
        """Layers that took statistics of all tasks' rows."""

    def _draws(self) -> bool:
        """Whether the model draws random numbers in training."""
        with left_as_it_was(self.owner, training=True), shown(self.forward):
            state = random_state()
            self.forward.start(together(self.tasks[:1]))
            self._called(self.call)
            return was_drawn(state)

    def _called(self, call: Call) -> Any:
        return call.on_fresh_inputs()

    def way(self) -> Way:
        statistics = [module for module in self.owner.modules() if takes_statistics(module)]
        with left_as_it_was(self.owner, training=self.training) as rewind, shown(self.forward):
            alone: list[Any] = []
            for task in self.tasks:
                rewind()
                self.forward.start(together((task,)))
                alone.append(self.call.on_fresh_inputs())
            handles = [module.register_forward_pre_hook(self._notice) for module in statistics]
            rewind()
            self.forward.start(together(self.tasks))
            self.forward.learns = True
            try:
                return self._found(self.call.on_fresh_inputs(), alone)
            except Exception as error:  # whatever the backbone raises when it meets more rows than it was given
                return Way(False, f"with the rows of several tasks it raises {type(error).__name__}: {error}")
            finally:
                for handle in handles:
                    handle.remove()

    def _notice(self, module: nn.Module, args: Any) -> None:
        if self.forward.layout.num_streams > 1:
            self.mixed.append(type(module).__name__)

    def _found(self, shared: Any, alone: list[Any]) -> Way:
        """Whether ``shared`` holds what the tasks have alone, and where."""
        if self.mixed:
            return Way(False, f"its {self.mixed[0]} layers would take statistics of all tasks' rows together")
        if any(structure(output) != structure(shared) for output in alone):
            return Way(False, "what it returns has another structure then, or other numbers")
        if (hidden := opaque(shared)) is not None:
            return Way(False, f"what it returns holds a {type(hidden).__name__}, in which nobody sees the rows")
        found: list[Leaf] = []
        for leaf, *own in zip(tensors(shared), *map(tensors, alone), strict=True):
            place = self._place(leaf, own)
            if place is None:
                shapes = f"{tuple(leaf.shape)} where each task alone gives {tuple(own[0].shape)}"
                return Way(False, f"an output of shape {shapes} is not what the tasks have alone")
            found.append(place)
        forward = self.forward
        rows = forward.num_rows or 0
        return Way(True, "", tuple(found), dict(forward.arguments), forward.layout.num_streams, rows)

    def _place(self, leaf: Tensor, own: list[Tensor]) -> Leaf | None:
        """How ``leaf`` holds the tensors that the tasks have alone, if it does."""
        axes = [axis for axis, size in enumerate(own[0].shape) if size == self.forward.num_rows]
        if same([leaf] * len(own), own, next(iter(axes), None), self.is_low):
            return Leaf(next(iter(axes), None), False)
        for axis in axes if leaf.ndim == own[0].ndim else ():
            layout = layout_of(leaf, axis, self.forward)
            if layout is not None and same(
                [rows_of(leaf, axis, layout, t) for t in self.tasks], own, axis, self.is_low
            ):
                return Leaf(axis, True)
        return None


def same(found: Sequence[Tensor], own: Sequence[Tensor], axis: int | None, is_low: bool) -> bool:
    """Whether results of one computation in different batches are the same, far from what a wrong row would be.

    Args:
        found, own: a tensor for every task.
        axis: where their rows are. Each entry is held to how much it differs among rows and tasks.
        is_low: weights of less than 32 bits.
    """
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(found, own, strict=True)):
        return False
    a, b = torch.stack(list(found)).detach(), torch.stack(list(own)).detach()
    if not (b.is_floating_point() or b.is_complex()):
        return torch.equal(a, b)
    low = is_low or torch.is_autocast_enabled(b.device.type) or b.dtype.itemsize < 4
    of_spread, of_size = (0.03, 0.01) if low else (1e-3, 1e-5) if b.dtype != torch.float64 else (1e-5, 1e-7)
    a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (a, b))
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (torch.where(x.isfinite(), x, torch.zeros_like(x)).double() for x in (a, b))
    if not b.numel():
        return True
    over = (0,) if axis is None else (0, axis + 1)
    spread = b.std(over, correction=0, keepdim=True)
    allowed = of_spread * spread + of_size * (b.abs() + 0.1 * b.square().mean().sqrt()) + 1e-30
    return bool(((a - b) / allowed).square().mean() <= 1)


def layout_of(leaf: Tensor, axis: int, forward: Forward) -> Layout | None:
    """The streams that ``leaf`` holds: those that the forward had at some block, of as many rows."""
    rows = leaf.shape[axis]
    return next((layout for layout in forward.seen if rows == layout.num_streams * (forward.num_rows or 0)), None)


def rows_of(leaf: Tensor, axis: int, layout: Layout, task: str) -> Tensor:
    """The rows of ``task``; a view."""
    rows = leaf.shape[axis] // layout.num_streams
    return leaf.narrow(axis, layout.index_of(task) * rows, rows)
