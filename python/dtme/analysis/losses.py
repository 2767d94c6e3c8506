"""One batch through the model: each task's loss, and where its gradient starts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isfinite, isnan, nan
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..interrupts import Deferred
from ..plan import check_tasks
from ..trees import map_tensors, tensors
from .folder import function_name
from .gradients import NO_GRADIENT
from .heads import loss_of_others

Step = Callable[[nn.Module, Any], Mapping[str, Tensor | float]]
"""``step(model, batch) -> {task: scalar loss}``, for models that own their loop.

A number, such as 0.0 where a batch has no label of a task, says that the task has no gradient in this batch.
"""

_NO_LABELS = "; where a batch has no labels of a task, step returns the number 0.0 for it"


class Started(NamedTuple):
    """The tasks of a batch that have a loss, ready to be differentiated."""

    tasks: tuple[str, ...]
    outputs: list[Tensor]
    seeds: list[list[Tensor | None]]
    """Per task its gradients at ``outputs``."""
    losses: Tensor
    """(K',) float64."""
    swapped: Tensor
    """(K',) float64: the same with the labels of other images; NaN where that was not looked at, or is not known."""


class ByTask:
    """The losses of a ``MultiTaskModel``, one function per task.

    Args:
        tasks: those that are to be looked at, a task of ``losses`` each.
    """

    def __init__(self, model: Any, losses: Mapping[str, Callable[[Any, Any], Tensor]], signals: Deferred) -> None:
        self.model, self.losses, self.signals = model, losses, signals
        self.tasks = tuple(losses)
        self.last_problem: dict[str, str] = {}
        """Why a task was left out of the last batch that it was left out of."""

    def forward(self, batch: Any) -> None:
        with self.signals.allowed():
            self.model.extract(_unpack(batch)[0], self.tasks)

    def names(self) -> dict[str, str | None]:
        """Of the functions, to tell an analysis from another one."""
        return {task: function_name(loss) for task, loss in self.losses.items()}

    def start(self, batch: Any, tasks: Sequence[str], swap: bool = False) -> Started:
        """Every head's own graph is walked once and freed; K gradients at the features then go through the encoder.

        The graph of a decoder is every task's, and kept for the last of them.

        Args:
            swap: also take the losses with the labels of other images.
        """
        model, (x, targets) = self.model, _unpack(batch)
        labelled = tuple(task for task in tasks if targets.get(task) is not None)
        there = [task for task in targets if targets[task] is not None]
        self.last_problem |= {
            task: f"loader yields no target for task {task!r}, only for {there}"
            for task in tasks
            if task not in labelled
        }
        with self.signals.allowed():
            # all tasks' features also where one has no target: which streams share must not depend on it
            features = model.extract(x, model.tasks_for(self.tasks)[1])
            if not labelled:
                return Started((), [], [], *torch.zeros(2, 0, dtype=torch.float64))
            leaves = list({id(leaf): leaf for leaf in tensors(features) if leaf.requires_grad}.values())
            if not leaves:
                kinds = ", ".join(dict.fromkeys(type(value).__name__ for value in features.values()))
                if any(True for _ in tensors(features)):
                    raise ValueError(f"the features ({kinds}) are not connected to the blocks: {NO_GRADIENT}")
                raise ValueError(f"features returned a {kinds}: return a tensor, or tuples, lists and dicts of tensors")
            cut = {id(leaf): leaf.detach().requires_grad_() for leaf in leaves}
            parts = map_tensors(lambda leaf: cut.get(id(leaf), leaf), features)
            predictions = model.predict(parts, labelled)
            values, swapped = self._values(batch, predictions, labelled, swap)
            check_losses(values, "")
            numbers = _numbers(values)
            present = [task for task in labelled if isfinite(numbers[task])]
            for task in labelled:
                if task not in present:
                    self._check_labels(task, predictions[task], targets[task], numbers[task])
                    self.last_problem[task] = _not_finite(task, numbers[task])
            seeds: list[list[Tensor | None]] = [
                list(
                    torch.autograd.grad(
                        values[task],
                        list(cut.values()),
                        retain_graph=model.decoder is not None and task != present[-1],
                        allow_unused=True,
                    )
                )
                for task in present
            ]
        return Started(tuple(present), leaves, seeds, _stack(numbers, present), _stack(swapped, present))

    def _values(
        self, batch: Any, predictions: Mapping[str, Any], tasks: Sequence[str], swap: bool
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The losses of ``tasks``, and those with the labels of other images: NaN without ``swap``."""
        x, targets = batch
        values, swapped = {}, dict.fromkeys(tasks, nan)
        for task in tasks:
            loss, prediction, target = self.losses[task], predictions[task], targets[task]
            of_others = loss_of_others(loss, x, prediction, target) if swap else None
            values[task] = loss(prediction, target)
            if of_others is not None:
                swapped[task] = of_others()
        return values, swapped

    def _check_labels(self, task: str, prediction: Any, target: Any, value: float) -> None:
        """A loss of 0 / 0 is a mean over no labels, if it stays so whatever is predicted.

        Raises:
            ValueError: a prediction is not finite, or another one mends it: the labels are not what is wrong.
        """
        said = _not_finite(task, value)
        if not isnan(value):
            raise ValueError(said)
        if not all(bool(leaf.isfinite().all()) for leaf in tensors(prediction)):
            raise ValueError(f"{said}, and so is its prediction")
        if (mended := mended_loss(self.losses[task], prediction, target)) is not None:
            number, other = mended
            raise ValueError(f"{said}, though it is {other} where {number} is predicted everywhere")


class ByStep:
    """The losses that a ``step`` function returns."""

    def __init__(self, model: nn.Module, step: Step, signals: Deferred) -> None:
        self.model, self.step, self.signals = model, step, signals
        self.tasks: tuple[str, ...] = ()
        """Known from the first batch on."""
        self.last_problem: dict[str, str] = {}

    def forward(self, batch: Any) -> None:
        with self.signals.allowed():
            self._check_tasks(self.step(self.model, batch))

    def names(self) -> dict[str, str | None]:
        return {"step": function_name(self.step)}

    def start(self, batch: Any, tasks: Sequence[str], swap: bool = False) -> Started:
        """What the labels of ``step`` are is not known: ``swap`` does nothing."""
        with self.signals.allowed():
            values: Any = self.step(self.model, batch)
        self._check_tasks(values)
        given = {task: values[task] for task in (tasks or self.tasks) if not _is_number(values[task])}
        for task, value in values.items():
            if _is_number(value):
                if not isfinite(value):
                    raise ValueError(_not_finite(task, value))
                self.last_problem[task] = f"step returned the number {value} for task {task!r}"
        check_losses(given, _NO_LABELS)
        numbers = _numbers(given)
        for task, number in numbers.items():
            if not isfinite(number):
                self.last_problem[task] = _not_finite(task, number)
                if not isnan(number):  # 0 / 0 is a mean over no labels
                    raise ValueError(self.last_problem[task])
        present = [task for task in given if isfinite(numbers[task])]
        seeds = [[torch.ones_like(values[t]) if t == task else None for t in present] for task in present]
        unknown = torch.full((len(present),), nan, dtype=torch.float64)
        return Started(tuple(present), [values[task] for task in present], seeds, _stack(numbers, present), unknown)

    def _check_tasks(self, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise TypeError(f"step must return {{task: scalar loss}}, got {type(values).__name__}")
        tasks = check_tasks(list(values))
        if len(tasks) < 2:
            raise ValueError(f"step must return the losses of at least two tasks, got {list(tasks)}")
        if self.tasks and set(tasks) != set(self.tasks):
            before = f"in the first batch of {list(self.tasks)}"
            raise ValueError(f"step returned losses of {list(tasks)}, {before}{_NO_LABELS}")
        self.tasks = self.tasks or tasks


def mended_loss(loss: Callable[[Any, Any], Tensor], prediction: Any, target: Any) -> tuple[float, float] | None:
    """A number that makes a loss finite where it is predicted everywhere, and that loss.

    None where there is no such number, because all labels are ignored: the loss is a mean over none.
    """
    for number in (0.0, 1.0):
        with torch.no_grad():
            other = loss(map_tensors(partial(torch.full_like, fill_value=number), prediction), target)
        if bool(torch.as_tensor(other).isfinite().all()):
            return number, float(other)
    return None


def _not_finite(task: str, value: float) -> str:
    return f"the loss of task {task!r} is not finite: {value}"


def check_losses(values: Mapping[str, Any], hint: str) -> None:
    """ValueError naming a task whose loss is no scalar tensor, or depends on nothing."""
    for task, value in values.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss of task {task!r} must be a scalar tensor, got {got}{hint}")
        if not value.requires_grad:
            problem = "is not connected to the blocks: it has no gradient"
            raise ValueError(f"the loss of task {task!r} {problem}{hint}")


def _numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Read at once."""
    if not values:
        return {}
    stacked = torch.stack([value.detach().double().reshape(()) for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def _stack(numbers: Mapping[str, float], tasks: Sequence[str]) -> Tensor:
    return torch.tensor([numbers[task] for task in tasks], dtype=torch.float64)


def _unpack(batch: Any) -> tuple[Any, Mapping[str, Any]]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Mapping):
        raise ValueError(f"loader must yield (x, {{task: target}}), got {type(batch).__name__}")
    return batch[0], batch[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
