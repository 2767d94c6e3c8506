"""Rows of one batch that have different tasks: one pass, in which every row runs in the stream of its task.

Nothing is repeated: the backbone meets the rows that it was given. What may still go wrong is a backbone that mixes
rows, or moves them. So the first call of its kind is compared, on probe values, with all rows run for one task each;
where that fails, the rows of every task run by themselves.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .caches import caches_in, claim, filled_by_row, mark_new
from .expanded import Expansion
from .forwards import compiled_parts
from .layouts import by_row, together
from .plan import check_task_of_row
from .row_comparison import RowComparison, Verdict, check_parts, parts_of, take_rows, telling_tasks
from .sharded import in_step, mesh_in_use
from .sharing import MOST_KINDS, Call, Caller, caller_level, shown
from .streams import Forward, Survey, expansions_of, running, survey
from .torch_private import eagerly
from .trees import structure, tensors

if TYPE_CHECKING:
    from .model import MultiTaskModel


def rows_by_task(task_of_row: Sequence[str], tasks: Sequence[str]) -> dict[str, list[int]]:
    """``{task: its rows}`` of the tasks that have some, in the order of ``tasks``."""
    return {task: [i for i, own in enumerate(task_of_row) if own == task] for task in tasks if task in task_of_row}


class RowWays(Caller):
    """What is known of the calls of one caller with rows of several tasks, which differ by what is given."""

    def __init__(self, owner: nn.Module, expansions: tuple[Expansion, ...], function: Any) -> None:
        super().__init__(owner, expansions, function)
        self._known: dict[Any, Verdict] = {}

    def run(
        self, task_of_row: tuple[str, ...], call: Call, state: Survey, *, is_taken_apart: bool
    ) -> tuple[Any, Verdict]:
        """What ``call`` returns, its rows those that went in; nothing, where they cannot run together.

        Args:
            is_taken_apart: whether the rows of every task are wanted by themselves, so that it must be known where they
                are, and what they would be alone. Else ``task_of_row`` may have several names in a row for one that the
                blocks see, as beams have that share what an encoder reads.
        """
        with _opened(state):
            for _ in range(2):
                verdict = self._find_out(task_of_row, call, state, is_taken_apart)
                if not verdict.together:
                    return None, verdict
                mark = filled_by_row(task_of_row, self.expansions)
                claim(call[1:], mark)
                forward = Forward(self.expansions)
                forward.may_thin_out = not is_taken_apart
                with shown(forward):
                    forward.start(by_row(task_of_row))
                    output = call()
                mark_new(output, mark)
                if not is_taken_apart or verdict.fits(output, len(task_of_row)):
                    return output, verdict
                self._known.pop(_kind(call, state), None)
                if mesh_in_use(self.owner) is not None:
                    raise RuntimeError(
                        "what the backbone returns is of another kind on this rank than at its first call, and the "
                        "ranks of a model sharded by FSDP2 cannot compare their rows again by themselves"
                    )
                if any(caches_in(call[1:])):  # filled now: it cannot be called again
                    break
            return None, Verdict(False, "what it returns is of another kind than at its first call")

    def run_apart(self, rows: dict[str, list[int]], call: Call, num_rows: int, state: Survey) -> dict[str, Any]:
        """``{task: what call returns for its rows}``, one task after the other."""
        check_parts(call, num_rows)
        found: dict[str, Any] = {}
        with _opened(state):
            for task, own in rows.items():
                forward = Forward(self.expansions)
                with shown(forward):
                    forward.start(together((task,)))
                    found[task] = Call(call.function, *parts_of(call[1:], own, num_rows)).on_fresh_inputs()
        return found

    def _find_out(self, task_of_row: tuple[str, ...], call: Call, state: Survey, is_taken_apart: bool) -> Verdict:
        """The verdict for this call, which is compared now if it is the first of its kind, or the largest."""
        if state.fingerprint != self._fingerprint:
            self._known.clear()
            self._fingerprint = state.fingerprint
        kind = _kind(call, state)
        known, mesh = self._known.get(kind), mesh_in_use(self.owner)
        is_new = known is None or (known.together and known.num_rows < len(task_of_row))
        if mesh is not None:  # a comparison is more forwards, for which all ranks have to be there
            is_new = in_step(mesh, sorted(set(task_of_row)), is_new)
        if known is not None and not is_new:
            return known
        is_training = state.is_training
        if mesh is not None:  # on a rank in training, it begins with one more forward: so in the mode of all
            is_training = in_step(mesh, sorted(set(task_of_row)), is_training)
        tasks, has_part = telling_tasks(state.adapters, self.expansions[0].tasks), is_taken_apart and mesh is None
        comparison = RowComparison(self.owner, self.expansions, tasks, task_of_row, call, is_training, has_part)
        comparison.forward.may_thin_out = not is_taken_apart
        verdict = comparison.verdict()
        is_certain = comparison.distinct or not verdict.together  # of rows that are all the same not all is known
        if is_taken_apart and not is_certain:
            verdict = Verdict(False)
        if mesh is not None and in_step(mesh, sorted(set(task_of_row)), not verdict.together) and verdict.together:
            verdict = Verdict(False, "on another rank they cannot")
        if is_certain:
            if len(self._known) >= MOST_KINDS:
                self._known.clear()
            self._known[kind] = verdict
        if verdict.reason and not self._has_warned:
            self._has_warned = True
            kind_of_owner = type(self.owner).__name__
            message = f"{kind_of_owner} runs the rows of every task by themselves, not in one pass: {verdict.reason}"
            warnings.warn(message, stacklevel=caller_level())
        return verdict


def _kind(call: Call, state: Survey) -> Any:
    """What calls have in common that one comparison is for."""
    return state.mode, structure(call[1:], single=True)


@contextmanager
def _opened(state: Survey) -> Iterator[None]:
    """Parts that are compiled run eagerly: they would be compiled anew for every order of tasks."""
    if not state.has_compiled_parts:
        yield
        return
    with compiled_parts, torch.compiler.set_stance("force_eager"):
        yield


def call_mixed_rows(ways: RowWays, task_of_row: tuple[str, ...], call: Call) -> Any:
    """What a backbone that is called directly returns for rows of several tasks, in the order of the batch."""
    output, verdict = ways.run(task_of_row, call, survey(ways.owner), is_taken_apart=False)
    if not verdict.together:
        raise RuntimeError(
            f"rows of several tasks cannot run in one pass through this {type(ways.owner).__name__} "
            f"({verdict.reason}): run the rows of every task by themselves, or use a MultiTaskModel, which does"
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
    output, verdict = ways.run(task_of_row, call, state, is_taken_apart=True)
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
