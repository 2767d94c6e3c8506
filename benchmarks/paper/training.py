"""Train and score a multi-task model on images with dense labels: what the demo and the tables share."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import dtme

from .losses import LOSSES
from .metrics import METERS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which pretrained backbones expect


class PixelHead(nn.Module):
    """The paper's decoder, one 3×3 Conv-BN-ReLU on the grid of patch tokens, then each becomes its patch of pixels.

    Args:
        num_features: p, width of the tokens.
        channels: C, outputs a pixel.
        grid: (h, w) patches; tokens before the last h * w (class, registers) are left out.
        patch: pixels along a patch's side.
    """

    def __init__(self, num_features: int, channels: int, grid: tuple[int, int], patch: int) -> None:
        super().__init__()
        self.grid, self.patch = grid, patch
        self.mix = nn.Sequential(
            nn.Conv2d(num_features, num_features, 3, padding=1, bias=False), nn.BatchNorm2d(num_features), nn.ReLU()
        )
        self.project = nn.Conv2d(num_features, channels * patch**2, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, p) → (B, C, h * patch, w * patch)."""
        height, width = self.grid
        patches = tokens[:, tokens.shape[1] - height * width :].mT.unflatten(2, self.grid)
        return F.pixel_shuffle(self.project(self.mix(patches)), self.patch)


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
        losses = torch.stack([LOSSES[task](predictions[task], labels[task]) for task in model.tasks])
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
    meters = {task: METERS[task]() for task in model.tasks}
    for images, labels in data:
        for task, prediction in model(images).items():
            meters[task].update(prediction, labels[task])
    return {task: meter.compute() for task, meter in meters.items()}
