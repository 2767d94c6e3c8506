"""Run a forward of several tasks through an expanded backbone: behind a shared prefix, or one task after the other."""

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .caches import claim, filled_for, is_cache, mark_new
from .expanded import alike
from .layouts import Layout, apart, repeat_rows, together
from .parameters import is_frozen, warn_of_frozen
from .randomness import random_state, wind_back
from .sharded import mesh_in_use
from .sharing import ONE_BY_ONE, Call, Leaf, UnknownArgument, Way, Ways, caller_level, layout_of, rows_of
from .streams import Forward, Survey, hide, show, traced
from .torch_private import eagerly, stay_eager
from .trees import leaves, map_leaves, opaque, tensors

ANY_TASK = ("*",)
"""Stands for the task that ``Forward.task_index`` names: a compiled graph must not know which."""

ATTEMPTS = 3
"""As it is known, as it is compared again, and one task after the other."""

compiled_parts = threading.RLock()
"""Held by a forward some of whose blocks are compiled by themselves: they find its state on the expansion."""


class Opening:
    """A forward of some tasks, opened for one call: the part of it that ``torch.compile`` does not see.

    Args:
        ways: what is known of such calls.
        tasks: those that were asked for.
        state: of what is called.
        is_compiled: whether what follows is handed to ``torch.compile``.
    """

    def __init__(self, ways: Ways, tasks: tuple[str, ...], call: Call, state: Survey, *, is_compiled: bool) -> None:
        self.ways, self.call, self.asked, self.state = ways, call, tasks, state
        index = self._task_index() if is_compiled and not torch.is_grad_enabled() else None
        self.tasks = tasks if index is None else ANY_TASK
        self._is_exposed = state.has_compiled_parts and not is_compiled
        self._fills = filled_for(tasks, ways.expansions)
        if self._fills is not None:
            claim(call[1:], self._fills)
        self.forward = Forward(ways.expansions, task_index=index)
        if self._is_exposed:
            compiled_parts.acquire()
        try:
            self.mesh = mesh_in_use(ways.owner)
            self.way = ways.find_out(self.tasks, call, state, mesh=self.mesh, force_eager=self._is_exposed)
        except BaseException:
            if self._is_exposed:
                compiled_parts.release()
            raise
        if state.is_training and torch.is_grad_enabled():
            self._warn_of_frozen()
        self._expose(self.forward)
        show(self.forward)

    def _warn_of_frozen(self) -> None:
        if not self.ways.expansions[0].has_warned_of_frozen and is_frozen(self.state.adapters):
            self.ways.expansions[0].has_warned_of_frozen = True
            warn_of_frozen(self.state.adapters, caller_level())

    def _task_index(self) -> Tensor | None:
        """The one task that was asked for, as a tensor, if all tasks may share a graph."""
        (task, *others), (expansion, *_) = self.asked, self.ways.expansions
        known, owner_of = expansion.tasks, expansion.owner_of
        affine = all(one.modulator == "affine" for one in self.ways.expansions)
        same = all(one.tasks == known and one.owner_of == owner_of for one in self.ways.expansions)
        if others or not affine or not same or len(known) == 1:
            return None
        device = next((p.device for p in self.ways.owner.parameters()), torch.device("cpu"))
        return torch.tensor([expansion.owners.index(owner_of[task])], device=device)

    def _expose(self, forward: Forward | None) -> None:
        if self._is_exposed:
            for expansion in self.ways.expansions:
                expansion.traced = forward

    def compare_again(self) -> None:
        """The call met something that the first one of its kind did not. The second time it no longer shares."""
        if self.mesh is not None:
            raise RuntimeError(
                "what the backbone returns, or is given, is of another kind on this rank than at its first call, and "
                "the ranks of a model sharded by FSDP2 cannot compare their tasks again by themselves: use "
                "dtme.expand(..., shared_prefix=False)"
            )
        self.forward.attempt += 1
        self.ways.forget(self.tasks, self.call, self.state)
        self._expose(None)
        self.way = ONE_BY_ONE
        if self.forward.attempt < ATTEMPTS - 1:
            self.way = self.ways.find_out(self.tasks, self.call, self.state, force_eager=self._is_exposed)
        self._expose(self.forward)

    @stay_eager
    def carry_out(self, function: Callable[..., Any]) -> Any:
        """``function(forward, way, tasks, call)``, compared again where it meets something new; closes the forward."""
        try:
            while True:
                try:
                    output = function(self.forward, self.way, self.tasks, self.call)
                    break
                except UnknownArgument:
                    eagerly(self.compare_again)
            eagerly(mark_new, output, self._fills)
            return output
        finally:
            eagerly(self._close)

    def _close(self) -> None:
        hide(self.forward)
        self._expose(None)
        if self._is_exposed:
            compiled_parts.release()


def run(forward: Forward, way: Way, tasks: tuple[str, ...], call: Call) -> dict[str, Any]:
    """``{task: what call returns for it}``; views of one output where the tasks share, one view for every stream."""
    with traced(forward):
        if not way.shares:
            return _one_by_one(forward, tasks, call)
        output = _shared(forward, way, tasks, call)
        parts = [(stream, _rows_of_task(way, output, forward, stream[0])) for stream in forward.layout.streams]
        found = {task: part for stream, part in parts for task in stream}
        return {task: found[task] for task in tasks}


def run_folded(forward: Forward, way: Way, tasks: tuple[str, ...], call: Call) -> Any:
    """What ``call`` returns, its tensors task-major: the rows of all tasks, also where they share them."""
    with traced(forward):
        if way.shares:
            return _complete(way, _shared(forward, way, tasks, call), forward, tasks)
        outputs = list(_one_by_one(forward, tasks, call).values())
        return outputs[0] if len(outputs) == 1 else _fold(outputs)


def _one_by_one(forward: Forward, tasks: tuple[str, ...], call: Call) -> dict[str, Any]:
    """A run for every task, but only one for tasks that no block tells apart."""
    found: dict[str, Any] = {}
    sets = list(alike(tasks, forward.expansions).values())
    is_plain = len(sets) == 1 or torch.compiler.is_compiling()
    # every task draws the random numbers that it would draw alone: blocks left out by chance are left out for all
    state = None if is_plain else random_state()
    for some in sets:
        if state is not None:
            wind_back(state)
        forward.start(together(some))
        found |= dict.fromkeys(some, call() if is_plain else call.on_fresh_inputs())
    return {task: found[task] for task in tasks}


def _shared(forward: Forward, way: Way, tasks: tuple[str, ...], call: Call) -> Any:
    forward.start(together(tasks))
    forward.arguments = way.arguments
    output = call()
    found = list(tensors(output))
    known = len(found) == len(way.leaves) and forward.layout.num_streams <= way.num_streams
    if not torch.compiler.is_compiling():  # a larger batch may take another branch
        known = known and (forward.num_rows or 0) <= way.num_rows
    if not known or not all(_is_as_ever(leaf, place, forward) for leaf, place in zip(found, way.leaves, strict=True)):
        raise UnknownArgument("what the backbone returns, or is given, is of another kind than at its first call")
    return output


def _is_as_ever(leaf: Tensor, place: Leaf, forward: Forward) -> bool:
    """Whether a tensor that all tasks shared when calls were compared still has the rows of one stream."""
    if place.is_split or place.axis is None or forward.num_rows is None:
        return True
    return leaf.ndim > place.axis and leaf.shape[place.axis] == forward.num_rows


def _map_places(way: Way, output: Any, function: Callable[[Tensor, int | None, bool], Tensor]) -> Any:
    """``function(leaf, axis, is_split)`` of every tensor."""
    places = iter(way.leaves)

    def at_place(leaf: Any) -> Any:
        return function(leaf, *next(places)) if isinstance(leaf, Tensor) else leaf

    return map_leaves(at_place, output)


def _layout_of(leaf: Tensor, axis: int, forward: Forward) -> Layout:
    layout = layout_of(leaf, axis, forward)
    if layout is None:
        raise RuntimeError(
            f"an output of shape {tuple(leaf.shape)} does not hold the rows of {forward.layout.num_streams} task "
            f"streams of {forward.num_rows}"
        )
    return layout


def _rows_of_task(way: Way, output: Any, forward: Forward, task: str) -> Any:
    def part(leaf: Tensor, axis: int | None, is_split: bool) -> Tensor:
        if not is_split or axis is None or forward.num_rows is None:  # no block ran: all of it is shared
            return leaf
        return rows_of(leaf, axis, _layout_of(leaf, axis, forward), task)

    return _map_places(way, output, part)


def _complete(way: Way, output: Any, forward: Forward, tasks: tuple[str, ...]) -> Any:
    if not way.num_rows:  # a method that runs no block, and may have been given the rows of all tasks
        return output

    def whole(leaf: Tensor, axis: int | None, is_split: bool) -> Tensor:
        if not is_split or axis is None or forward.num_rows is None:
            return torch.cat([leaf] * len(tasks)) if leaf.ndim else leaf
        layout = _layout_of(leaf, axis, forward)
        if axis:  # task-major on the first axis all the same, where split looks
            return torch.cat([rows_of(leaf, axis, layout, task) for task in tasks])
        return repeat_rows(leaf, apart(tasks).sources(layout), layout.num_streams)

    return _map_places(way, output, whole)


def _fold(outputs: Sequence[Any]) -> Any:
    """Outputs of one structure as one whose tensors are task-major. A key-value cache becomes None.

    Raises:
        RuntimeError: something in it is no tensor with rows, and not the same for all tasks.
    """
    rest = [iter(list(leaves(output))) for output in outputs]

    def folded(leaf: Any) -> Any:
        parts = [next(others, None) for others in rest]
        if isinstance(leaf, Tensor) and leaf.ndim:
            return torch.cat(parts)  # type: ignore[arg-type]
        if is_cache(leaf):
            return None
        equal: Callable[[Any, Any], bool] = torch.equal if isinstance(leaf, Tensor) else operator.eq
        if opaque(leaf) is None and all(type(part) is type(leaf) and equal(part, leaf) for part in parts):
            return leaf
        kind = "a tensor without rows" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        raise RuntimeError(
            f"the expanded backbone returns {kind} that is not the same for all tasks: choose one task, or use a "
            "MultiTaskModel"
        )

    return map_leaves(folded, outputs[0])
