"""Improvable gap balancing."""

import torch
from torch import Tensor, nn

from ..arms import Combination, Facts
from ..tasks import Tasks
from .weights import EPOCH, OF_THE_WHOLE_BATCH, check_not_negative


class ImprovableGaps(Combination):
    """IGB v1: Σ w_i log L_i with w = K softmax(L / L⁰): a task counts for more the less it has improved.

    Dai, Fei, Lu: Improvable Gap Balancing for Multi-Task Learning (UAI 2023), the variant without reinforcement
    learning, as the authors' code (github.com/YanqiDai/IGB4MTL) computes it: L⁰ is a task's mean loss in the second
    epoch, the desired loss is zero, and until the second epoch has ended all weights are 1. The softmax sees the losses
    of the batch, and no gradient goes through it.

    Deviations: an epoch is a number of steps. A task whose loss is zero, which has no labels in the batch, takes no
    part in the step, and its mean is one over the batches with labels; if the second epoch has none, its first labels
    later give L⁰.

    Args:
        epoch: steps that count as one.

    Raises:
        ValueError: at a step, a loss is negative: it has no logarithm.
    """

    one_device_only = OF_THE_WHOLE_BATCH
    sums: Tensor
    counts: Tensor
    last_weights: Tensor

    def __init__(self, tasks: Tasks, epoch: int = EPOCH) -> None:
        super().__init__(tasks)
        self.epoch, self.steps = epoch, 0
        self.register_buffer("sums", torch.zeros(len(self.names)))
        self.register_buffer("counts", torch.zeros(len(self.names)))
        self.register_buffer("last_weights", torch.zeros(len(self.names)))

    def backward(self, model: nn.Module, losses: dict[str, Tensor]) -> None:
        check_not_negative(losses)
        values = torch.stack(list(losses.values()))
        present = values.detach() > 0
        self.last_weights = self._weights(values.detach(), present)
        self._count(values.detach(), present)
        # of an absent task, the logarithm of 1: log(0) times a weight of 0 would be NaN
        (self.last_weights * torch.where(present, values, 1.0).log()).sum().backward()

    def _weights(self, values: Tensor, present: Tensor) -> Tensor:
        if self.steps < 2 * self.epoch or not present.any():
            return present.to(values.dtype)
        gaps = torch.where(self.counts > 0, values / (self.sums / self.counts), 1.0)
        return present.sum() * gaps.masked_fill(~present, -torch.inf).softmax(0)

    def _count(self, values: Tensor, present: Tensor) -> None:
        in_second_epoch = self.epoch <= self.steps < 2 * self.epoch
        counted = present if in_second_epoch else present & (self.counts == 0) & (self.steps >= 2 * self.epoch)
        self.sums = self.sums + torch.where(counted, values, 0.0)
        self.counts = self.counts + counted
        self.steps += 1

    def facts(self) -> Facts:
        """L⁰, None where it is not known, and the weights of the last step; 0 for an absent task."""
        means = (self.sums / self.counts.clamp(min=1)).tolist()
        known = (self.counts > 0).tolist() if self.steps >= 2 * self.epoch else [False] * len(self.names)
        return {
            "base_losses": {
                name: mean if is_known else None for name, mean, is_known in zip(self.names, means, known, strict=True)
            },
            "weights": dict(zip(self.names, self.last_weights.tolist(), strict=True)),
        }
