"""Run a forward of several tasks through an expanded backbone: behind a shared prefix, or one task after the other."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .randomness import rewinder
from .sharing import Call, UnknownArgument, Way, Ways, layout_of, rows_of
from .streams import Forward, Layout, apart, hide, repeat_rows, show, together, traced
from .trees import map_leaves, tensors

ANY_TASK = ("*",)
"""Stands for the task that ``Forward.task_index`` names: a compiled graph must not know which."""

_compiled_parts = threading.RLock()
"""Held by a forward some of whose blocks are compiled by themselves: they find its state on the expansion."""


class Opening:
    """A forward of some tasks, opened for one call: the part of it that ``torch.compile`` does not see.

    Args:
        ways: what is known of such calls.
        tasks: those that were asked for.
        has_compiled_parts: whether some of the blocks are compiled by themselves.
        is_compiled: whether what follows is handed to ``torch.compile``.
    """

    def __init__(
        self, ways: Ways, tasks: tuple[str, ...], call: Call, *, has_compiled_parts: bool, is_compiled: bool
    ) -> None:
        self.ways, self.call, self.asked = ways, call, tasks
        index = self._task_index() if is_compiled and not torch.is_grad_enabled() else None
        self.tasks = tasks if index is None else ANY_TASK
        self._is_exposed = has_compiled_parts and not is_compiled
        self.forward = Forward(ways.expansions, task_index=index)
        if self._is_exposed:
            _compiled_parts.acquire()
        try:
            self.way = ways.find_out(self.tasks, call, force_eager=self._is_exposed)
        except BaseException:
            if self._is_exposed:
                _compiled_parts.release()
            raise
        self._expose(self.forward)
        show(self.forward)

    def _task_index(self) -> Tensor | None:
        """The one task that was asked for, as a tensor, if all tasks may share a graph."""
        (task, *others), (expansion, *_) = self.asked, self.ways.expansions
        known = expansion.tasks
        affine = all(one.modulator == "affine" and one.tasks == known for one in self.ways.expansions)
        if others or not affine or len(known) == 1:
            return None
        device = next((p.device for p in self.ways.owner.parameters()), torch.device("cpu"))
        return torch.tensor([known.index(task)], device=device)

    def _expose(self, forward: Forward | None) -> None:
        if self._is_exposed:
            for expansion in self.ways.expansions:
                expansion.traced = forward

    def compare_again(self) -> None:
        """The call met something that the first one of its kind did not."""
        self.ways.forget(self.tasks, self.call)
        self._expose(None)
        self.way = self.ways.find_out(self.tasks, self.call, force_eager=self._is_exposed)
        self._expose(self.forward)

    def close(self) -> None:
        hide(self.forward)
        self._expose(None)
        if self._is_exposed:
            _compiled_parts.release()


def run(forward: Forward, way: Way, tasks: tuple[str, ...], call: Call) -> dict[str, Any]:
    """``{task: what call returns for it}``; views of one output where the tasks share."""
    with traced(forward):
        if not way.shares:
            return _one_by_one(forward, tasks, call)
        output = _shared(forward, way, tasks, call)
        return {task: _rows_of_task(way, output, forward, task) for task in tasks}


def run_folded(forward: Forward, way: Way, tasks: tuple[str, ...], call: Call) -> Any:
    """What ``call`` returns, its tensors task-major: the rows of all tasks, also where they share them."""
    with traced(forward):
        if way.shares:
            return _complete(way, _shared(forward, way, tasks, call), forward, tasks)
        outputs = list(_one_by_one(forward, tasks, call).values())
        return outputs[0] if len(outputs) == 1 else _fold(outputs)


def _one_by_one(forward: Forward, tasks: tuple[str, ...], call: Call) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # every task draws the random numbers that it would draw alone: blocks left out by chance are left out for all
    rewind = rewinder() if len(tasks) > 1 and not torch.compiler.is_compiling() else None
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


def _map_places(way: Way, output: Any, function: Callable[[Tensor, int, bool], Tensor]) -> Any:
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
    def part(leaf: Tensor, axis: int, is_split: bool) -> Tensor:
        if not is_split or forward.num_rows is None:  # no block ran: all of it is shared
            return leaf
        return rows_of(leaf, axis, _layout_of(leaf, axis, forward), task)

    return _map_places(way, output, part)


def _complete(way: Way, output: Any, forward: Forward, tasks: tuple[str, ...]) -> Any:
    def whole(leaf: Tensor, axis: int, is_split: bool) -> Tensor:
        if not is_split or forward.num_rows is None:
            return torch.cat([leaf] * len(tasks)) if leaf.ndim else leaf
        layout = _layout_of(leaf, axis, forward)
        return repeat_rows(leaf, apart(tasks).sources(layout), layout.num_streams, axis)

    return _map_places(way, output, whole)


def _fold(outputs: Sequence[Any]) -> Any:
    """Outputs of one structure as one whose tensors are task-major.

    What has no rows is the mean of the tasks' (a loss, say), and what is no tensor and no option, a cache say, is None.
    """
    rest = [iter(list(tensors(output))) for output in outputs]

    def folded(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, (bool, int, float, str)) else None
        parts = [next(others) for others in rest]
        return torch.cat(parts) if leaf.ndim else torch.stack(parts).mean(0)

    return map_leaves(folded, outputs[0])
