"""The metrics of a comparison: functions of all predictions, or meters that are updated batch by batch."""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..trees import map_tensors, tensors, to_device
from .training import Diverged

HIGHER, LOWER = "higher", "lower"
DIRECTIONS = (HIGHER, LOWER)
METER_METHODS = ("update", "compute")


class Metric:
    """A task's metric and in which direction it gets better.

    Args:
        task: whose.
        given: what a user gives: ``(metric, "higher" | "lower")``. The metric is one of

            - a *function* ``metric(predictions, targets) -> float`` of all rows of a split, each a tensor that the
              batches are concatenated to, on the CPU;
            - a *meter*: an object with ``update(prediction, target)`` and ``compute()``, as torchmetrics has them, of
              which every evaluation copies the given state; or what makes one: a class (or ``functools.partial`` of
              one), or a function without arguments. A meter that is a module is moved to the device of the model;
              any other is given tensors on the CPU.

    Raises:
        TypeError, ValueError: it is none of these, or cannot be told; the message names the task.
    """

    def __init__(self, task: str, given: Any) -> None:
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise ValueError(f"metrics[{task!r}] must be a pair (metric, 'higher' or 'lower'), got {given!r}")
        self.task, (self.given, self.direction) = task, given
        if self.direction not in DIRECTIONS:
            raise ValueError(f"the direction of metrics[{task!r}] must be 'higher' or 'lower', got {self.direction!r}")
        self.kind = _kind_of(task, self.given)

    def meter(self, device: torch.device) -> Any:
        """A new one, with ``update`` and ``compute``."""
        if self.kind == "function":
            return _All(self.task, self.given)
        made = copy.deepcopy(self.given) if self.kind == "meter" else self.given()
        if not _is_meter(made):
            raise TypeError(
                f"metrics[{self.task!r}] was called without arguments and must return a meter with update and compute, "
                f"got {type(made).__name__}"
            )
        return made.to(device) if isinstance(made, nn.Module) else made


def evaluate(
    model: nn.Module, batches: Iterable[Any], metrics: Mapping[str, Metric], device: torch.device
) -> dict[str, float]:
    """Every task's metric in evaluation mode.

    Raises:
        Diverged: predictions hold NaN, or a metric fails on infinite ones; the message names the task.
        ValueError: a task has no target in any batch; its metric is no number, or changes what it is given in place.
    """
    meters = {task: metric.meter(device) for task, metric in metrics.items()}
    seen = dict.fromkeys(metrics, False)
    infinite: set[str] = set()
    model.eval()
    with torch.no_grad():
        for x, targets in batches:
            predictions = model(to_device(x, device))
            for task, meter in meters.items():
                target = targets.get(task)
                if target is None:
                    continue
                seen[task] = True
                place = device if isinstance(meter, nn.Module) else torch.device("cpu")
                prediction = to_device(map_tensors(Tensor.detach, predictions[task]), place)
                if _has(torch.isnan, prediction):
                    raise Diverged(f"the predictions of {task!r} hold NaN")
                if task not in infinite and _has(torch.isinf, prediction):
                    infinite.add(task)
                with _failing(task, infinite):
                    _update(task, meter, prediction, to_device(target, place))
    if unseen := [task for task, was in seen.items() if not was]:
        raise ValueError(f"no batch of the held-out data has a target of task {unseen[0]!r}")
    values = {}
    for task, meter in meters.items():
        with _failing(task, infinite):
            values[task] = _number(task, meter.compute())
    return values


def _has(test: Callable[[Tensor], Tensor], prediction: Any) -> bool:
    return any(bool(test(leaf).any()) for leaf in tensors(prediction))


@contextmanager
def _failing(task: str, infinite: Collection[str]) -> Iterator[None]:
    """What a metric raises on infinite predictions, as many do, is that the run diverged."""
    try:
        yield
    except Exception as error:
        if task not in infinite:
            raise
        raise Diverged(f"the predictions of {task!r} are infinite, on which its metric fails ({error})") from error


def _update(task: str, meter: Any, prediction: Any, target: Any) -> None:
    """ValueError where the meter changes the tensors that it is given, which may be the loader's own."""
    given = [leaf for leaf in tensors([prediction, target]) if not leaf.is_inference()]
    versions = [leaf._version for leaf in given]
    meter.update(prediction, target)
    if [leaf._version for leaf in given] != versions:
        raise ValueError(
            f"metrics[{task!r}] changes the predictions or targets that it is given in place, so that what is "
            "evaluated next would be measured by others: let it change a copy"
        )


class _All:
    """A function of all predictions and targets as a meter."""

    def __init__(self, task: str, function: Callable[[Any, Any], Any]) -> None:
        self.task, self.function = task, function
        self.parts: list[tuple[Tensor, Tensor]] = []

    def update(self, prediction: Any, target: Any) -> None:
        if not isinstance(prediction, Tensor) or not isinstance(target, Tensor):
            kinds = f"{type(prediction).__name__} and {type(target).__name__}"
            raise TypeError(
                f"metrics[{self.task!r}] is a function of concatenated tensors, but prediction and target are {kinds}: "
                "give a meter with update and compute instead"
            )
        self.parts.append((prediction, target))

    def compute(self) -> Any:
        try:
            predictions, targets = (torch.cat(list(parts)) for parts in zip(*self.parts, strict=True))
        except RuntimeError as error:
            raise ValueError(
                f"metrics[{self.task!r}] is a function, but the batches cannot be concatenated ({error}): give a meter "
                "with update and compute instead"
            ) from error
        return self.function(predictions, targets)


def _kind_of(task: str, given: Any) -> str:
    if isinstance(given, type) or (isinstance(given, functools.partial) and isinstance(given.func, type)):
        return "factory"
    if _is_meter(given):
        return "meter"
    if not callable(given):
        raise TypeError(f"metrics[{task!r}] must hold a function, a meter or what makes one, got {given!r}")
    takes_none, takes_two = _takes(given, 0), _takes(given, 2)
    if takes_none == takes_two:
        can = "neither no arguments nor two" if not takes_none else "both no arguments and two"
        raise ValueError(
            f"metrics[{task!r}] takes {can}, so that it cannot be told from what makes a meter: give a function of "
            "(predictions, targets), or one without arguments that returns a meter"
        )
    return "function" if takes_two else "factory"


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether it can be called with so many arguments; what has no signature is taken for a function of two."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return count == 2
    return True


def _is_meter(value: Any) -> bool:
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in METER_METHODS)


def _number(task: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        if isinstance(value, (Tensor, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise ValueError(f"metrics[{task!r}] must give one number, got a {type(value).__name__}{shape}") from None


def is_known(values: Mapping[str, float]) -> bool:
    """Whether every one of them is a finite number."""
    return all(math.isfinite(value) for value in values.values())
