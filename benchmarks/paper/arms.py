"""An arm of an experiment: how the model is built, and how the losses of its tasks become one gradient.

The two are independent of each other, and each is one class per idea: a ``Structure`` turns the model in training into
the one that is compared (``structures``), a ``Combination`` does a training step's forward and backward pass
(``combinations``). An arm names one of each. Both are pickled with the model when a run is saved, so they hold no
functions of their own: no lambdas, no closures.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import dtme
from dtme.blocks import find_blocks

from .tasks import Tasks, losses_of

Batch = tuple[Any, dict[str, Tensor]]
"""Inputs, and every task's labels."""
Facts = dict[str, Any]
"""What the JSON of a run keeps of a structure or a combination: only what JSON holds."""
RATIOS = (100.0, 1.0, 10.0, 500.0, 1000.0)
"""The r of the paper: its default, then the others of Fig. 5. An analysis reads the gradients once for all of them."""


class Model(Protocol):
    """What is trained: a ``dtme.MultiTaskModel``, or an ``nn.Module`` that has these methods of it."""

    tasks: Sequence[str]

    def __call__(self, x: Any, tasks: Any = None) -> dict[str, Tensor]: ...
    def shared_parameters(self) -> list[nn.Parameter]: ...
    def task_parameters(self, task: str) -> list[nn.Parameter]: ...
    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]: ...


@dataclass
class Setting:
    """What a structure may look at when it is applied to a model in training."""

    model: dtme.MultiTaskModel
    loader: Iterable[Batch]
    """Training batches, the same at every iteration: as many as an analysis reads."""
    tasks: Tasks
    """Those of the model."""
    seed: int
    num_tokens: int = 6
    """t of the reference plan, TM + TE."""
    modulation: float = 0.5
    expansion: float = 0.5
    """Shares of the blocks of the reference plan."""
    file: Path | None = None
    """Of the report, which all arms read that start from the same model."""

    @cached_property
    def report(self) -> dtme.ConflictReport:
        """Of the model as it is, at ``RATIOS`` (``report.at(r)``), read once whoever asks."""
        if self.file is not None and self.file.exists():
            return dtme.ConflictReport.load(self.file)
        report = dtme.analyze(self.model, self.loader, losses_of(self.tasks), ratio=RATIOS, progress=False)
        if self.file is not None:
            report.save(self.file)
        return report

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        return tuple(find_blocks(self.model.backbone))

    @property
    def width(self) -> int:
        """p, which all blocks share."""
        return int(self.model.backbone.config.hidden_size)

    @property
    def budget(self) -> int:
        """Parameters that the reference plan adds to the backbone, whichever blocks it chooses: what rivals match."""
        names = tuple(self.tasks)
        chosen = [
            dict.fromkeys(self.blocks[: max(1, round(share * len(self.blocks))) if share else 0], names)
            for share in (self.modulation, self.expansion)
        ]
        return dtme.ExpansionPlan(names, self.num_tokens, *chosen).added_parameters(self.width)


class Structure(Protocol):
    """How the model of an arm is built."""

    def apply(self, setting: Setting) -> tuple[nn.Module, Facts]:
        """Turn ``setting.model``, which may be changed in place, into the arm's model (a ``Model``).

        Returns:
            the model, and facts: ``{"added": number of new parameters}`` and whatever else tells what was done.
        """
        ...


class Plain:
    """The jointly trained model as it is."""

    def apply(self, setting: Setting) -> tuple[nn.Module, Facts]:
        return setting.model, {"added": 0}


class Combination(nn.Module):
    """How the losses of the tasks become the gradients of a step. Here: their sum; subclasses override ``backward``.

    Its own parameters are trained with the model's. It is made anew for every run and pickled with it.
    """

    one_device_only = ""
    """Why it cannot average its gradients over several devices; empty where it can."""

    def __init__(self, tasks: Tasks) -> None:
        super().__init__()
        self.names = tuple(tasks)

    def prepare(self, model: nn.Module) -> None:
        """Before the first step with this model: when training starts, and again when the structure was applied."""

    def step(self, model: nn.Module, batch: Batch, tasks: Tasks) -> dict[str, Tensor]:
        """Forward and backward of a batch: leaves ``.grad``, which was None, on what is to be trained.

        Returns:
            every task's loss, detached.

        Raises:
            FloatingPointError: a loss, or a gradient that was looked at, is not finite; the message names the task.
        """
        x, labels = batch
        losses = self.measure(model(x), labels, tasks)
        self.backward(model, losses)
        return {name: loss.detach() for name, loss in losses.items()}

    def measure(self, predictions: dict[str, Tensor], labels: dict[str, Tensor], tasks: Tasks) -> dict[str, Tensor]:
        """Every task's loss, which is finite."""
        losses = {name: tasks[name].loss(predictions[name], labels[name]) for name in self.names}
        values = torch.stack([loss.detach() for loss in losses.values()])
        if not values.isfinite().all():  # one look at all of them: on a GPU each look waits for it
            name, value = next((name, value) for name, value in losses.items() if not value.isfinite())
            raise FloatingPointError(f"the loss of {name!r} is {value.item()}")
        return losses

    def backward(self, model: nn.Module, losses: dict[str, Tensor]) -> None:
        torch.stack(list(losses.values())).sum().backward()

    def after(self, model: nn.Module, batch: Batch, tasks: Tasks) -> None:
        """After the optimizer's step."""

    def facts(self) -> Facts:
        """Of the state at the end of a run."""
        return {}


@dataclass(frozen=True)
class Arm:
    """One row of a comparison."""

    title: str
    """As the report prints it."""
    structure: Callable[[], Structure] = Plain
    combination: Callable[[Tasks], Combination] = Combination
    start: float | None = None
    """After what share of the steps the structure is applied; None for the experiment's own choice. Until then the
    model trains jointly, and arms with the same ``combination`` share that part."""
    is_single: bool = False
    """Whether every task is trained alone: a run per task."""
