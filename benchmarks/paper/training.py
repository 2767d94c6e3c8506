"""Train and score a multi-task model on images with dense labels: what the demo and the tables share."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import dtme

from .data.rooms import TASKS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which pretrained backbones expect


class Batches:
    """A data set held in memory: images normalised for the backbone, labels as rendered.

    Iterating gives ``(images, {task: labels})`` in order; ``shuffled`` gives endless random batches.
    """

    def __init__(self, images: Tensor, labels: Mapping[str, Tensor], batch: int, device: torch.device) -> None:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        self.mean, self.std = mean.to(device), std.to(device)
        self.images = (images.to(device) - self.mean) / self.std
        self.labels = {task: label.to(device) for task, label in labels.items()}
        self.batch = batch

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images → colours in [0, 1]."""
        return images * self.std + self.mean

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def _take(self, index: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index], {task: label[index] for task, label in self.labels.items()}

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for first in range(0, len(self.images), self.batch):
            yield self._take(slice(first, first + self.batch))

    def shuffled(self, seed: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.images), generator=generator)
            for index in order.split(self.batch)[: max(1, len(order) // self.batch)]:
                yield self._take(index.to(self.images.device))


def train(
    model: dtme.MultiTaskModel, data: Batches, steps: int, lr: float, seed: int, name: str
) -> dict[str, list[float]]:
    """Adam under a polynomial schedule (power 0.9), all loss weights 1.

    Returns:
        {task: loss at every step}.
    """
    optimizer = torch.optim.Adam(model.parameter_groups(lr=lr, weight_decay=1e-6))
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    history: list[Tensor] = []
    model.train()
    bar = tqdm(range(steps), desc=name, unit="step")
    for _, (images, labels) in zip(bar, data.shuffled(seed), strict=False):
        predictions = model(images)
        losses = torch.stack([TASKS[task].loss(predictions[task], labels[task]) for task in model.tasks])
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()
        schedule.step()
        history.append(losses.detach())
    columns = torch.stack(history).T.tolist() if history else [[] for _ in model.tasks]
    return dict(zip(model.tasks, columns, strict=True))


@torch.no_grad()
def evaluate(model: dtme.MultiTaskModel, data: Batches) -> dict[str, float]:
    """{task: its metric over the whole split}."""
    model.eval()
    meters = {task: TASKS[task].meter() for task in model.tasks}
    for images, labels in data:
        for task, prediction in model(images).items():
            meters[task].update(prediction, labels[task])
    return {task: meter.compute() for task, meter in meters.items()}
