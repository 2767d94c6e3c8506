"""Combinations that weigh the losses of the tasks, and need nothing but their values.

A task that has no labels in a batch has a loss of exactly zero. The formulas below take it for a task that is solved,
or divide by it. Here it takes no part in the step: the others get the weights that the formula gives them alone, and
what was learned about the absent one stays as it is.

What the weights sum up to is each method's own, as it was published: K for DWA, 1 for FAMO, and half of K for UW at the
start. An arm's learning rate is tuned, and Adam divides by the scale of the gradients, so that nothing is made equal.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchjd.scalarization import DWA, FAMO, UW, Scalarizer

from ..arms import Batch, Combination, Facts
from ..tasks import Tasks

EPOCH = 25
"""Steps that count as an epoch where a method looks at means over epochs. Runs are measured in steps here, and differ
in how many of them an epoch of their data has; 25 is what Nash-MTL's public code takes for DWA."""
OF_THE_WHOLE_BATCH = "its weights follow the losses of the whole batch, of which a device sees a part"


class FixedWeights(Combination):
    """The sum of the losses, each times the weight that InvPT gives its task (``Task.weight``)."""

    def __init__(self, tasks: Tasks) -> None:
        super().__init__(tasks)
        self.weights = {name: task.weight for name, task in tasks.items()}

    def backward(self, model: nn.Module, losses: dict[str, Tensor]) -> None:
        super().backward(model, {name: self.weights[name] * loss for name, loss in losses.items()})

    def facts(self) -> Facts:
        return {"weights": self.weights}


class Scalarized(Combination):
    """A scalarizer of torchjd makes one number of the losses; its gradient is the step's.

    Subclasses say what stands in for the loss of an absent task, so that the scalarizer treats the others as if they
    were alone.
    """

    last_weights: Tensor

    def __init__(self, tasks: Tasks, scalarizer: Scalarizer) -> None:
        super().__init__(tasks)
        self.scalarizer = scalarizer
        self.register_buffer("last_weights", torch.zeros(len(self.names)))

    def stand_ins(self, values: Tensor, present: Tensor) -> Tensor:
        """(K,) values for absent tasks; those of present tasks are not looked at.

        Args:
            values: (K,), the losses, detached.
            present: (K,) bool.
        """
        raise NotImplementedError

    def backward(self, model: nn.Module, losses: dict[str, Tensor]) -> None:
        values = torch.stack(list(losses.values()))
        present = values.detach() != 0
        values = torch.where(present, values, self.stand_ins(values.detach(), present))
        total = self.scalarizer(values)
        (weights,) = torch.autograd.grad(total, values, retain_graph=True)
        self.last_weights = torch.where(present, weights, 0.0)
        total.backward()

    def facts(self) -> Facts:
        """What the gradients of the losses were multiplied by in the last step; 0 for an absent task."""
        return {"weights": dict(zip(self.names, self.last_weights.tolist(), strict=True))}


class UncertaintyWeights(Scalarized):
    """UW: Σ ½ exp(-s_i) L_i + ½ s_i, where the optimizer trains the log-variances s_i, from 0, with the model.

    Kendall, Gal, Cipolla: Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics (CVPR
    2018), equation 7 for every task, as others use it; Kendall weighs losses of classes without the ½. The weights are
    ½ at first, and 1 / (2 L_i) where the log-variances have settled.
    """

    scalarizer: UW

    def __init__(self, tasks: Tasks) -> None:
        super().__init__(tasks, UW(len(tasks)))

    def stand_ins(self, values: Tensor, present: Tensor) -> Tensor:
        return self.scalarizer.log_var.detach().exp()  # the loss for which s is right: its gradient is zero


class DynamicWeightAverage(Scalarized):
    """DWA: weights K softmax(r / T), where r is the mean loss of the last epoch over that of the one before.

    Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention (CVPR 2019), T = 2. All weigh 1 for
    two epochs. In the means, an absent task's last known loss stands for it.

    Args:
        epoch: steps that count as one.
        temperature: T.
    """

    one_device_only = OF_THE_WHOLE_BATCH
    scalarizer: DWA
    last_losses: Tensor

    def __init__(self, tasks: Tasks, epoch: int = EPOCH, temperature: float = 2.0) -> None:
        super().__init__(tasks, DWA(temperature))
        self.epoch, self.steps = epoch, 0
        self.register_buffer("last_losses", torch.ones(len(self.names)))

    def stand_ins(self, values: Tensor, present: Tensor) -> Tensor:
        self.last_losses = torch.where(present, values, self.last_losses)
        return self.last_losses

    def after(self, model: nn.Module, batch: Batch, tasks: Tasks) -> None:
        self.steps += 1
        if self.steps % self.epoch == 0:
            self.scalarizer.step()


class FastAdaptiveWeights(Scalarized):
    """FAMO: all losses fall at the same rate, whatever their scale. It runs the batch again after the step.

    Liu, Feng, Stone, Liu: FAMO: Fast Adaptive Multitask Optimization (NeurIPS 2023), algorithm 1: the direction is
    Σ z_i ∇log L_i over Σ z_i / L_i with z = softmax(ξ), and ξ follows, by an Adam of its own (0.025, decay 0.001), how
    much each log L_i fell in the step. ξ are parameters of this module, which the optimizer is given and leaves alone:
    they never have a gradient when it steps. The second run of the batch is in training mode, as in the authors' code,
    but leaves neither the batch norms nor the random state changed.
    """

    one_device_only = OF_THE_WHOLE_BATCH
    scalarizer: FAMO

    def __init__(self, tasks: Tasks) -> None:
        super().__init__(tasks, FAMO(len(tasks)))
        self.before: tuple[Tensor, Tensor] | None = None

    def backward(self, model: nn.Module, losses: dict[str, Tensor]) -> None:
        check_not_negative(losses)
        super().backward(model, losses)

    def stand_ins(self, values: Tensor, present: Tensor) -> Tensor:
        large = torch.full_like(values, 1e30)  # nothing in the sum of z_i / L_i
        self.before = torch.where(present, values, large), present
        return large

    def after(self, model: nn.Module, batch: Batch, tasks: Tasks) -> None:
        if self.before is None:
            raise RuntimeError("FAMO looks at how a step changed the losses: call step, then after, once each")
        (before, present), self.before = self.before, None
        x, labels = batch
        with torch.no_grad(), undisturbed(model):
            losses = self.measure(model(x), labels, tasks)
        values = torch.stack(list(losses.values()))
        # an absent task as if its loss had fallen as the others did: then nothing pulls at it
        (logits,) = self.scalarizer.parameters()
        weights = torch.where(present, logits.detach().softmax(0), 0.0)
        fallen = (weights * (before.log() - values.log()).where(present, 0.0)).sum() / weights.sum()
        values = torch.where(present, values, before * torch.exp(-fallen))
        self.scalarizer.update(torch.where(present.any(), values, before))


def check_not_negative(losses: dict[str, Tensor]) -> None:
    """For methods that take logarithms of losses.

    Raises:
        ValueError: a loss is negative; the message names its task.
    """
    for name, loss in losses.items():
        if loss.detach() < 0:
            raise ValueError(f"the loss of {name!r} is {loss.item()}: this method takes logarithms of losses")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers, such as statistics of batch norms, and the random state are afterwards as they were before."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
