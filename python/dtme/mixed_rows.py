"""Rows of one batch that have different tasks: one pass, in which every row runs in the stream of its task.

Nothing is repeated: the backbone meets the rows that it was given. What may still go wrong is a backbone that mixes
rows, or moves them. So the first call of its kind is compared, on probe values, with all rows run for one task each;
where that fails, the rows of every task run by themselves.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .caches import claim, copy_of, filled_by_row, is_cache, mark_new
from .expanded import Expansion
from .forwards import compiled_parts
from .layouts import by_row, together
from .plan import check_task_of_row
from .randomness import left_as_it_was
from .sharded import in_step, mesh_in_use
from .sharing import Call, Comparison, caller_level, same, shown
from .streams import Forward, Survey, expansions_of, running, survey
from .torch_private import eagerly, takes_statistics
from .trees import leaves, map_leaves, map_tensors, structure, tensors

if TYPE_CHECKING:
    from .model import MultiTaskModel

MOST_ALONE = 4
"""Tasks that a comparison runs alone: whether a backbone keeps its rows apart does not depend on the task."""


def rows_by_task(task_of_row: Sequence[str], tasks: Sequence[str]) -> dict[str, list[int]]:
    """``{task: its rows}`` of the tasks that have some, in the order of ``tasks``."""
    return {task: [i for i, own in enumerate(task_of_row) if own == task] for task in tasks if task in task_of_row}


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


class RowWays:
    """What is known of the calls of one caller with rows of several tasks, which differ by what is given.

    Args:
        owner: the module that is called.
        expansions: those whose adapters it meets.
        function: what it calls; for other expansions or another function, other ``RowWays`` are needed.
    """

    def __init__(self, owner: nn.Module, expansions: tuple[Expansion, ...], function: Any) -> None:
        self.owner, self.expansions, self.function = owner, expansions, function
        self._known: dict[Any, Verdict] = {}
        self._fingerprint: int | None = None
        self._has_warned = False

    def are_for(self, expansions: tuple[Expansion, ...], function: Any) -> bool:
        same_ones = [id(one) for one in expansions] == [id(one) for one in self.expansions]
        return same_ones and function is self.function

    def run(self, task_of_row: tuple[str, ...], call: Call, state: Survey) -> tuple[Any, Verdict]:
        """What ``call`` returns, its rows those that went in; nothing, where they cannot run together."""
        with _opened(state):
            verdict = self._find_out(task_of_row, call, state)
            if not verdict.together:
                return None, verdict
            mark = filled_by_row(task_of_row, self.expansions)
            claim(call[1:], mark)
            forward = Forward(self.expansions)
            with shown(forward):
                forward.start(by_row(task_of_row))
                output = call()
            mark_new(output, mark)
            return output, verdict

    def run_apart(self, rows: dict[str, list[int]], call: Call, num_rows: int, state: Survey) -> dict[str, Any]:
        """``{task: what call returns for its rows}``, one task after the other."""
        _check_parts(call, num_rows)
        found: dict[str, Any] = {}
        with _opened(state):
            for task, own in rows.items():
                forward = Forward(self.expansions)
                with shown(forward):
                    forward.start(together((task,)))
                    found[task] = Call(call.function, *_parts(call[1:], own, num_rows)).on_fresh_inputs()
        return found

    def _find_out(self, task_of_row: tuple[str, ...], call: Call, state: Survey) -> Verdict:
        """The verdict for this call, which is compared now if it is the first of its kind."""
        if state.fingerprint != self._fingerprint:
            self._known.clear()
            self._fingerprint = state.fingerprint
        kind = state.is_training, structure(call[1:], single=True)
        is_new, mesh = kind not in self._known, mesh_in_use(self.owner)
        if mesh is not None:  # a comparison is more forwards, for which all ranks have to be there
            is_new = in_step(mesh, sorted(set(task_of_row)), is_new)
        if not is_new:
            return self._known[kind]
        is_training = state.is_training
        if mesh is not None:  # on a rank in training, it begins with one more forward: so in the mode of all
            is_training = in_step(mesh, sorted(set(task_of_row)), is_training)
        comparison = RowComparison(self.owner, self.expansions, task_of_row, call, is_training)
        verdict = comparison.verdict()
        if mesh is not None and in_step(mesh, sorted(set(task_of_row)), not verdict.together) and verdict.together:
            verdict = Verdict(False, "on another rank they cannot")
        if comparison.forward.distinct or comparison.mixed:  # else rows that were mixed up would not have been seen
            self._known[kind] = verdict
        elif verdict.together:
            verdict = Verdict(False)
        if verdict.reason and not self._has_warned:
            self._has_warned = True
            kind_of_owner = type(self.owner).__name__
            message = f"{kind_of_owner} runs the rows of every task by themselves, not in one pass: {verdict.reason}"
            warnings.warn(message, stacklevel=caller_level())
        return verdict


@contextmanager
def _opened(state: Survey) -> Iterator[None]:
    """Parts that are compiled run eagerly: they would be compiled anew for every order of tasks."""
    if not state.has_compiled_parts:
        yield
        return
    with compiled_parts, torch.compiler.set_stance("force_eager"):
        yield


def _check_parts(call: Call, num_rows: int) -> None:
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


def _parts(tree: Any, rows: list[int], num_rows: int) -> Any:
    """``tree`` with ``rows`` alone of every tensor that has ``num_rows``."""

    def part(tensor: Tensor) -> Tensor:
        return take_rows(tensor, rows) if tensor.ndim and tensor.shape[0] == num_rows else tensor

    return map_tensors(part, tree)


class RowComparison(Comparison):
    """Rows of several tasks in one pass against all rows run for each of these tasks, on probe values."""

    def __init__(
        self,
        owner: nn.Module,
        expansions: tuple[Expansion, ...],
        task_of_row: tuple[str, ...],
        call: Call,
        training: bool,
    ) -> None:
        super().__init__(owner, expansions, tuple(dict.fromkeys(task_of_row)), call, training)
        self.tasks = self.tasks[:MOST_ALONE]
        self.task_of_row = tuple([self.tasks[i % len(self.tasks)] for i in range(len(task_of_row))])

    def verdict(self) -> Verdict:
        statistics = [module for module in self.owner.modules() if takes_statistics(module)]
        with left_as_it_was(self.owner, training=self.training) as rewind, shown(self.forward):
            alone = []
            for task in self.tasks:
                rewind()
                self.forward.start(together((task,)))
                alone.append(self._outputs())
            handles = [module.register_forward_pre_hook(self._notice) for module in statistics]
            rewind()
            self.forward.start(by_row(self.task_of_row))
            try:
                return self._judged(self._outputs(), alone)
            except Exception as error:  # whatever the backbone raises
                return Verdict(False, f"it raises {type(error).__name__}: {error}")
            finally:
                for handle in handles:
                    handle.remove()

    def _outputs(self) -> list[Tensor]:
        """The tensors of what the call returns, whose inputs stay as they are: a key-value cache, say, is copied."""

        def own(leaf: Any) -> Any:
            return copy_of(leaf) if is_cache(leaf) else leaf

        return list(tensors(Call(self.call.function, *map_leaves(own, self.call[1:])).on_fresh_inputs()))

    def _judged(self, found: list[Tensor], alone: list[list[Tensor]]) -> Verdict:
        if self.mixed:
            return Verdict(False, f"its {self.mixed[0]} layers take statistics of all rows together")
        if any(len(own) != len(found) for own in alone):
            return Verdict(False, "what it returns has another structure for other tasks")
        axes: list[int | None] = []
        for leaf, *own in zip(found, *alone, strict=True):
            fits, axis = self._axis(leaf, own)
            if not fits:
                return Verdict(False, f"rows of its output of shape {tuple(leaf.shape)} are not what they are alone")
            axes.append(axis)
        return Verdict(True, "", tuple(axes))

    def _axis(self, leaf: Tensor, own: list[Tensor]) -> tuple[bool, int | None]:
        """Whether every row of ``leaf`` is that of its task alone, and on which axis the rows are."""
        candidates = [axis for axis, size in enumerate(leaf.shape) if size == len(self.task_of_row)]
        for axis in candidates if all(one.shape == leaf.shape for one in own) else ():
            rows = [own[self.tasks.index(task)].select(axis, i) for i, task in enumerate(self.task_of_row)]
            if same([leaf], [torch.stack(rows, axis)], axis, self.is_low):
                return True, axis
        return not candidates and same([leaf] * len(own), own, None, self.is_low), None


def call_mixed_rows(ways: RowWays, task_of_row: tuple[str, ...], call: Call) -> Any:
    """What a backbone that is called directly returns for rows of several tasks, in the order of the batch."""
    output, verdict = ways.run(task_of_row, call, survey(ways.owner))
    if not verdict.together:
        why = f" ({verdict.reason})" if verdict.reason else ", as all rows of the first call were the same"
        raise RuntimeError(
            f"rows of several tasks cannot run in one pass through this {type(ways.owner).__name__}{why}: run the rows "
            "of every task by themselves, or use a MultiTaskModel, which does"
        )
    return output


# --- a MultiTaskModel -------------------------------------------------------------------------------------------------


def predict_mixed_rows(model: "MultiTaskModel", x: Any, tasks: Any, task_of_row: Any) -> dict[str, Any]:
    """``{task: predictions of its rows}``, as ``MultiTaskModel.forward`` describes it."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "task_of_row inside of a larger compiled function is not supported: every order of tasks would be compiled "
            "anew for every batch: compile the model itself, or its blocks"
        )
    if tasks is not None:
        raise ValueError("give tasks or task_of_row, which says what every row is for, not both")
    if model.decoder is not None:
        raise RuntimeError(
            "task_of_row is for models with a head for each task; this one has a decoder, which reads the features of "
            "all tasks of every row: call model(x, tasks)"
        )
    return eagerly(_predict, model, x, check_task_of_row(task_of_row, model.tasks))


def _predict(model: "MultiTaskModel", x: Any, task_of_row: tuple[str, ...]) -> dict[str, Any]:
    _check_length(x, task_of_row)
    rows = rows_by_task(task_of_row, model.tasks)
    if not rows:
        if (mesh := mesh_in_use(model)) is not None:
            in_step(mesh, ())  # ranks that have rows would wait for this one
        return {}
    if len(rows) == 1:
        return model(x, tuple(rows))
    state = survey(model.backbone)
    expansions = expansions_of(state.adapters)
    if any(running(expansion) is not None for expansion in expansions):
        raise RuntimeError("task_of_row cannot be given inside of another forward of the same backbone")
    call = model.call_of(x)
    if not expansions:
        features = call()
        if any(tensor.ndim and tensor.shape[0] != len(task_of_row) for tensor in tensors(features)):
            raise ValueError(f"task_of_row names {len(task_of_row)} rows, which the features of the model do not have")
        return model.predict({task: take_rows(features, own) for task, own in rows.items()}, tuple(rows))
    ways = model.row_ways_of(expansions)
    output, verdict = ways.run(task_of_row, call, state)
    if verdict.together:
        found = {task: take_rows(output, own, verdict.axes) for task, own in rows.items()}
    else:
        found = ways.run_apart(rows, call, len(task_of_row), state)
    return model.joined(model.predict(found, tuple(rows)))


def _check_length(x: Any, task_of_row: Sequence[str]) -> None:
    """ValueError where no tensor of the input has as many rows as there are names."""
    sizes = [tensor.shape[0] for tensor in tensors(x) if tensor.ndim]
    if sizes and len(task_of_row) not in sizes:
        raise ValueError(f"task_of_row names the tasks of {len(task_of_row)} rows, but the input has {sizes[0]}")
