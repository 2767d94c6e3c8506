"""May rows of several tasks run in one pass? One call is compared, on probe values, with all rows run for each task."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .caches import copy_of, is_cache
from .expanded import Expansion
from .layouts import Layout, by_row, thinned_out, together
from .randomness import left_as_it_was
from .sharing import Call, Comparison, same, shown
from .torch_private import takes_statistics
from .trees import leaves, map_leaves, map_tensors, tensors

if TYPE_CHECKING:
    from .block.adapter import BlockAdapter

ORDERS = 3
"""In which a comparison gives its rows tasks. In any single one, a backbone that turns the rows around or swaps halves
may put rows of one task in each other's places, where nothing shows."""


def telling_tasks(adapters: "Sequence[BlockAdapter]", tasks: Sequence[str]) -> tuple[str, ...]:
    """A few tasks of which some two differ at every block where any do, so that they tell rows apart behind it."""
    chosen = [tasks[0]]
    untold = [a for a in adapters if len({a.own_tasks.get(task) for task in tasks}) > 1]
    while untold:
        told = {task: [a for a in untold if a.own_tasks.get(task) != a.own_tasks.get(chosen[0])] for task in tasks}
        chosen.append(max(tasks, key=lambda task: len(told[task])))
        untold = [a for a in untold if a not in told[chosen[-1]]]
    return tuple(chosen)


def take_rows(output: Any, rows: Sequence[int], axes: Sequence[int | None] | None = None) -> Any:
    """``rows`` of every tensor in ``output``; a view where they are next to each other.

    Args:
        axes: where each tensor's rows are, None where it has none; by default they are on the first axis.
    """
    first, count = rows[0], len(rows)
    is_range = list(rows) == list(range(first, first + count))
    places = iter(axes or ())

    def take(tensor: Tensor) -> Tensor:
        axis = next(places) if axes is not None else 0 if tensor.ndim else None
        if axis is None:
            return tensor
        if is_range:
            return tensor.narrow(axis, first, count)
        return tensor.index_select(axis, torch.tensor(rows, device=tensor.device))

    return map_tensors(take, output)


class Verdict(NamedTuple):
    """How the rows of one kind of call run."""

    together: bool
    reason: str = ""
    """Why they do not run together."""
    axes: tuple[int | None, ...] = ()
    """For every tensor of what the call returns, where its rows are; None for what has none."""
    num_rows: int = 0
    """Of the batch that was compared: a larger one may take another branch."""

    def fits(self, output: Any, num_rows: int) -> bool:
        """Whether the tensors of ``output`` can be those of the call that was compared."""
        found = list(tensors(output))
        return len(found) == len(self.axes) and all(
            axis is None or (leaf.ndim > axis and leaf.shape[axis] == num_rows)
            for leaf, axis in zip(found, self.axes, strict=True)
        )


def check_parts(call: Call, num_rows: int) -> None:
    """Refuse what nobody can take the rows of one task from. The rows of a lone tensor are on its first axis."""
    given = list(leaves(call[1:]))
    if len(given) == 1 and isinstance(given[0], Tensor):
        return
    for leaf in given:
        if is_cache(leaf):
            raise RuntimeError(
                f"rows of several tasks cannot run in one pass here, and a {type(leaf).__name__} cannot be taken apart "
                "by rows: run the rows of every task by themselves"
            )
        axes = [axis for axis, size in enumerate(leaf.shape) if size == num_rows] if isinstance(leaf, Tensor) else []
        if axes and (len(axes) > 1 or axes[0] != 0):
            raise RuntimeError(
                "rows of several tasks cannot run in one pass here, and which axis of the input of shape "
                f"{tuple(leaf.shape)} has the {num_rows} rows is not known: run the rows of every task by themselves"
            )


def parts_of(tree: Any, rows: list[int], num_rows: int) -> Any:
    """``tree`` with ``rows`` alone of every tensor that has ``num_rows``."""

    def part(tensor: Tensor) -> Tensor:
        return take_rows(tensor, rows) if tensor.ndim and tensor.shape[0] == num_rows else tensor

    return map_tensors(part, tree)


class RowComparison(Comparison):
    """Rows of several tasks in one pass against all rows run for each of these tasks, on probe values.

    Args:
        tasks: as ``telling_tasks`` chooses them, whatever the rows of this call are for: what is found holds for all.
        has_part: also against some of the rows run by themselves, where they can be taken from what is given. That
            shows which tensors have rows at all: a table may have as many entries as there are rows, now.
    """

    def __init__(
        self,
        owner: nn.Module,
        expansions: tuple[Expansion, ...],
        tasks: tuple[str, ...],
        task_of_row: tuple[str, ...],
        call: Call,
        training: bool,
        has_part: bool,
    ) -> None:
        super().__init__(owner, expansions, tasks, call, training)
        self.task_of_row, self.has_part = task_of_row, has_part
        self.distinct = False
        """Whether not all rows of what came out were the same."""

    def verdict(self) -> Verdict:
        statistics = [module for module in self.owner.modules() if takes_statistics(module)]
        with left_as_it_was(self.owner, training=self.training) as rewind, shown(self.forward):

            def outputs(layout: Layout, call: Call = self.call) -> list[Tensor]:
                rewind()
                self.forward.start(layout)
                return list(tensors(self._called(call)))

            alone = [outputs(together((task,))) for task in self.tasks]
            orders = self._orders()
            handles = [module.register_forward_pre_hook(self._notice) for module in statistics]
            try:
                found = [outputs(by_row([self.tasks[i] for i in order])) for order in orders]
            except Exception as error:  # whatever the backbone raises
                return Verdict(False, f"it raises {type(error).__name__}: {error}")
            finally:
                for handle in handles:
                    handle.remove()
            rows = list(range(max(1, len(orders[0]) // 2), len(orders[0])))
            part = None
            if self.has_part and (call := _call_of_rows(self.call, rows, len(orders[0]))) is not None:
                part = outputs(together(self.tasks[:1]), call)
            return self._judged(orders, found, alone, rows, part)

    def _orders(self) -> list[list[int]]:
        """For every row that the blocks see the place of its task; the first rows differ in one order at least."""
        num_rows, seen, count = len(self.task_of_row), self.forward.num_rows, len(self.tasks)
        if self.forward.may_thin_out and seen and thinned_out(self.task_of_row, seen):
            num_rows = seen
        if count == 1:
            return [[0] * num_rows]
        draw, known = random.Random(0), count**ORDERS
        return [
            [i // count**k % count if i < known else draw.randrange(count) for i in range(num_rows)]
            for k in range(ORDERS)
        ]

    def _called(self, call: Call) -> Any:
        """What a call returns, whose inputs stay as they are: a key-value cache, say, is copied."""

        def own(leaf: Any) -> Any:
            return copy_of(leaf) if is_cache(leaf) else leaf

        return Call(call.function, *map_leaves(own, call[1:])).on_fresh_inputs()

    def _judged(
        self,
        orders: list[list[int]],
        found: list[list[Tensor]],
        alone: list[list[Tensor]],
        rows: list[int],
        part: list[Tensor] | None,
    ) -> Verdict:
        if self.mixed:
            return Verdict(False, f"its {self.mixed[0]} layers take statistics of all rows together")
        outputs = [*found, *alone, *([] if part is None else [part])]
        if any(len(own) != len(outputs[0]) for own in outputs):
            return Verdict(False, "what it returns has another structure for other tasks, or for some of its rows")
        axes: list[int | None] = []
        for i, leaf in enumerate(outputs[0]):
            some = None if part is None else (rows, part[i])
            fits, axis = self._axis(orders, [one[i] for one in found], [one[i] for one in alone], some)
            if not fits:
                return Verdict(False, f"rows of its output of shape {tuple(leaf.shape)} are not what they are alone")
            axes.append(axis)
        return Verdict(True, "", tuple(axes), len(self.task_of_row))

    def _axis(
        self, orders: list[list[int]], found: list[Tensor], own: list[Tensor], part: tuple[list[int], Tensor] | None
    ) -> tuple[bool, int | None]:
        """Whether every row is that of its task alone, and on which axis the rows are.

        Args:
            found: in every order.
            own: of every task alone.
            part: some of the rows, and what they are by themselves.
        """
        shape, num_rows = own[0].shape, len(orders[0])
        if any(one.shape != shape for one in (*found, *own)):
            return False, None
        candidates = [axis for axis, size in enumerate(shape) if size == num_rows]
        if part is not None:
            rows, some = part
            fewer = [torch.Size([*shape[:axis], len(rows), *shape[axis + 1 :]]) for axis in range(len(shape))]
            candidates = [axis for axis in candidates if some.shape == fewer[axis]]
        for axis in candidates:
            want = [torch.stack([own[task].select(axis, i) for i, task in enumerate(order)], axis) for order in orders]
            right = all(same([a], [b], axis, self.is_low) for a, b in zip(found, want, strict=True))
            if right and (part is None or same([some], [take_rows(own[0], rows, [axis])], axis, self.is_low)):
                first = own[0].narrow(axis, 0, 1)
                self.distinct = self.distinct or not same([first.expand_as(own[0])], [own[0]], axis, self.is_low)
                return True, axis
        others = [*found, *own, *([] if part is None else [part[1]])]
        return not candidates and same(others, [own[0]] * len(others), None, self.is_low), None


def _call_of_rows(call: Call, rows: list[int], num_rows: int) -> Call | None:
    """``call`` with ``rows`` alone of what it is given; None where they cannot be taken from it."""
    if all(tensor.ndim == 0 or tensor.shape[0] != num_rows for tensor in tensors(call[1:])):
        return None
    try:
        check_parts(call, num_rows)
    except RuntimeError:
        return None
    return Call(call.function, *parts_of(call[1:], rows, num_rows))
