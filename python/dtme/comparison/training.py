"""A run's training: the joint part that the arms of a seed share, and what each of them goes on with."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.folder import checksum
from ..analysis.losses import check_losses, mended_loss
from ..trees import leaves, tensors, to_device
from .batches import Batches, Marks, not_repeating, seed_everything, seed_of

POWER = 0.9
"""Of the polynomial by which the learning rate falls to zero."""
Losses = Mapping[str, Callable[[Any, Any], Tensor]]
Moments = dict[str, dict[str, Tensor]]
"""What Adam keeps for each parameter, by name."""


class Diverged(Exception):
    """A loss or a weight is not finite; the message names it and the step."""


@dataclass(frozen=True)
class Start:
    """The joint part of a seed, at whose end its arms part."""

    weights: dict[str, Tensor]
    """The state dict of the model."""
    moments: Moments
    epoch: int
    index: int
    """Where in the training data it ended: the next batch of an iteration."""
    checksum: int
    """Of all batches."""
    marks: dict[int, int]
    seconds: float

    @property
    def name(self) -> int:
        """A checksum of the weights."""
        return checksum([*self.weights, *leaves(self.weights)])


@dataclass(frozen=True)
class Schedule:
    """From 1 at the first step to 0 after the last, by a polynomial; beyond ``start``, stretched to ``steps``.

    An arm that trains for more steps than the others shares their rates up to ``start`` and falls more slowly then.
    """

    start: int
    budget: int
    steps: int

    def factor(self, step: int) -> float:
        """Of the learning rate, at a step that is counted from 0."""
        if step < self.start:
            return (1 - step / self.budget) ** POWER
        left = (self.steps - step) / (self.steps - self.start)
        return float(((1 - self.start / self.budget) * left) ** POWER)


def optimizer_of(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Adam:
    """Adam for all that is trained; by the model's ``parameter_groups`` where it has them."""
    if hasattr(model, "parameter_groups"):
        groups = [group for group in model.parameter_groups(lr, weight_decay) if group["params"]]  # type: ignore[operator]
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": trained, "lr": lr, "weight_decay": weight_decay}]
    optimizer = torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def moments_of(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> Moments:
    """A copy of what the optimizer keeps, by the parameters' names."""
    return {
        name: {key: value.detach().clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in names.items()
        if parameter in optimizer.state
    }


def take_up(
    optimizer: torch.optim.Optimizer, moments: Moments, names: Mapping[str, nn.Parameter], model: nn.Module
) -> list[str]:
    """Give the optimizer what was kept for those of its parameters that are named; others begin anew.

    A model that is a copy has parameters of its own: they take over by name and shape.

    Returns:
        names of which the model has neither the parameter nor one of that name and shape.
    """
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    held, own = set(model.parameters()), dict(model.named_parameters())
    left = []
    for name, kept in moments.items():
        parameter = names[name]
        if parameter not in held:
            if name not in own or own[name].shape != parameter.shape:
                left.append(name)
                continue
            parameter = own[name]
        if parameter in trained:
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in kept.items()
            }
    return left


@dataclass
class Training:
    """A model in training.

    Args:
        losses: by task; their sum is what falls.
        schedule: of the learning rate.
        seed: of what the model draws at each step.
        step: how many were done.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    losses: Losses
    schedule: Schedule
    marks: Marks
    seed: int
    device: torch.device
    step: int = 0

    def run(self, last: int, each: Callable[[], None]) -> None:
        """Up to step ``last``; ``each`` is called after every step.

        Raises:
            Diverged: a loss or, at the end, a weight is not finite.
            ValueError: the batches are not those of the run that this one is paired with.
        """
        self.model.train()
        while self.step < last:
            batch = self.batches.next()
            seed_everything(seed_of(self.seed, "step", self.step))
            self._step(batch)
            self.step += 1
            if not self.marks.note(self.step, self.batches.checksum):
                raise ValueError(f"{not_repeating(self.batches.loader, 'train')} (seen at step {self.step})")
            each()
        for name, weight in self.model.named_parameters():
            if not weight.isfinite().all():
                raise Diverged(f"the weights of {name} are not finite after {self.step} steps")

    def _step(self, batch: Any) -> None:
        factor = self.schedule.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        losses = losses_of(self.model, to_device(batch, self.device), self.losses, self.step)
        if losses:
            torch.stack([loss.reshape(()) for loss in losses.values()]).sum().backward()
            self.optimizer.step()


def losses_of(model: nn.Module, batch: Any, losses: Losses, step: int) -> dict[str, Tensor]:
    """The losses of the tasks that the batch has labels of.

    Raises:
        Diverged: one is not finite.
        ValueError: one is no scalar with a gradient.
    """
    x, targets = batch
    predictions = model(x)
    there = [task for task in losses if targets.get(task) is not None]
    values = {task: losses[task](predictions[task], targets[task]) for task in there}
    check_losses(values, "")
    numbers = torch.stack([value.detach().double().reshape(()) for value in values.values()]).tolist() if values else []
    for task, number in zip(there, numbers, strict=True):
        if math.isfinite(number):
            continue
        if math.isnan(number) and _has_no_labels(losses[task], predictions[task], targets[task]):
            del values[task]
        else:
            raise Diverged(f"the loss of {task!r} is {number} at step {step + 1}")
    return values


def _has_no_labels(loss: Callable[[Any, Any], Tensor], prediction: Any, target: Any) -> bool:
    """Whether a loss is a mean over no labels, because all of a batch are ignored."""
    is_finite = all(bool(leaf.isfinite().all()) for leaf in tensors(prediction))
    return is_finite and mended_loss(loss, prediction, target) is None
