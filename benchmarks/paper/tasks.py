"""A task of a data set: what its head puts out, what it is trained on, how it is scored; and tables of tasks."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .metrics import Meter

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(prediction, target)`` of a batch -> a float32 scalar; zero, with a graph, where nothing is labelled."""


@dataclass(frozen=True)
class Task:
    """One task of a data set, which has a table of them, ``{name: Task}``; nothing about a task stands elsewhere."""

    channels: int
    """Outputs of the head: per pixel, or per image or text."""
    loss: Loss
    meter: Callable[[], Meter]
    """A new meter for a split: ``update(prediction, target)`` a batch, ``compute()`` -> float, ``reset()``."""
    metric: str
    """Name of the metric, as it is printed."""
    unit: str
    lower_is_better: bool
    classes: tuple[str, ...] = ()
    """Their names; empty for a regression."""
    is_dense: bool = True
    """Whether the prediction is (B, channels, H, W); else it is (B, channels), one for the image or text."""
    weight: float = 1.0
    """Of the loss, in the set of weights that InvPT trains with. By default all losses weigh 1."""


Tasks = Mapping[str, Task]


def losses_of(tasks: Tasks) -> dict[str, Loss]:
    """As ``dtme`` takes them: ``{task: loss(prediction, target)}``."""
    return {name: task.loss for name, task in tasks.items()}


def scored(model: nn.Module, tasks: Tasks, batches: Iterable[tuple[Any, dict[str, Tensor]]]) -> dict[str, Meter]:
    """Every task's meter after the batches ``(x, {task: target})``, with the model as it is evaluated."""
    model.eval()
    meters = {name: task.meter() for name, task in tasks.items()}
    with torch.no_grad():
        for x, targets in batches:
            for name, prediction in model(x).items():
                meters[name].update(prediction, targets[name])
    return meters


def lower_is_better(tasks: Tasks) -> frozenset[str]:
    return frozenset(name for name, task in tasks.items() if task.lower_is_better)


def choose(tasks: Tasks, names: Iterable[str] | None) -> dict[str, Task]:
    """Those that are named, in the table's order; None for all.

    Raises:
        ValueError: an unknown task, or none.
    """
    names = list(tasks if names is None else names)
    unknown = [name for name in names if name not in tasks]
    if unknown or not names:
        raise ValueError(f"tasks must be among {', '.join(tasks)}, got {', '.join(map(repr, unknown)) or 'none'}")
    return {name: task for name, task in tasks.items() if name in names}
