"""Train and score a multi-task model on rendered rooms: what the demo and the experiments of the analysis share."""

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import NoReturn

import torch
from torch import Tensor
from tqdm.auto import tqdm

import dtme

from .data.dataset import Data
from .tasks import Tasks, scored

Batch = tuple[Tensor, dict[str, Tensor]]


class Batches:
    """A split of rooms in batches ``(images, {task: labels})`` on a device, in order; each is checked when it is read.

    Args:
        split: "train" or "val".
        batch: scenes per batch; the last one may have fewer.
    """

    def __init__(self, data: Data, split: str, batch: int, device: torch.device) -> None:
        self.data, self.split, self.batch, self.device = data, split, batch, device
        self.items = getattr(data, split)

    @property
    def tasks(self) -> Tasks:
        return self.data.tasks

    def take(self, index: Sequence[int] | Tensor) -> Batch:
        """The batch of some scenes.

        Raises:
            ValueError: an image or a label of it is not finite; the message names both.
        """
        index = torch.as_tensor(index).tolist()
        images, labels = self.items.batch(index)
        for name, values in {"image": images, **labels}.items():
            if values.is_floating_point() and not values.isfinite().all():
                self._refuse(index, name, values)
        return images.to(self.device), {task: label.to(self.device) for task, label in labels.items()}

    def _refuse(self, index: Sequence[int], name: str, values: Tensor) -> NoReturn:
        what = "image" if name == "image" else f"label {name!r}"
        wrong = (~values.isfinite()).flatten(1).sum(1).tolist()
        scenes = [f"{scene} ({count})" for scene, count in zip(index, wrong, strict=True) if count]
        raise ValueError(
            f"scenes of the split {self.split!r} whose {what} is not finite, and how many of its "
            f"{values[0].numel()} numbers: {', '.join(scenes)}"
        )

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        for index in torch.arange(len(self.items)).split(self.batch):
            yield self.take(index)

    def shuffled(self, seed: int) -> Iterator[tuple[list[int], Batch]]:
        """Endless random batches, with the scenes of each; no scene twice before all others, but for an incomplete
        batch, which is left out."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.items), generator=generator)
            for index in order.split(self.batch)[: max(1, len(order) // self.batch)]:
                yield index.tolist(), self.take(index)


def train(
    model: dtme.MultiTaskModel, data: Batches, steps: int, lr: float, seed: int, name: str
) -> dict[str, list[float]]:
    """Adam under a polynomial schedule (power 0.9), all loss weights 1.

    Returns:
        {task: loss at every step}.

    Raises:
        ValueError: an image or a label is not finite, or else a loss; the message names the scene, or the step, the
            task and the scenes.
    """
    optimizer = torch.optim.Adam(model.parameter_groups(lr=lr, weight_decay=1e-6))
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    history: list[Tensor] = []
    model.train()
    bar = tqdm(range(steps), desc=name, unit="step")
    for step, (scenes, (images, labels)) in zip(bar, data.shuffled(seed), strict=False):
        predictions = model(images)
        losses = torch.stack([data.tasks[task].loss(predictions[task], labels[task]) for task in model.tasks])
        if not losses.isfinite().all():
            values = dict(zip(model.tasks, losses.tolist(), strict=True))
            wrong = [f"{task!r} is {value}" for task, value in values.items() if not isfinite(value)]
            raise ValueError(
                f"{name}, step {step}: the loss of {', '.join(wrong)}, though its images and labels are finite "
                f"(scenes {', '.join(map(str, scenes))}). Try a lower learning rate"
            )
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()
        schedule.step()
        history.append(losses.detach())
    columns = torch.stack(history).T.tolist() if history else [[] for _ in model.tasks]
    return dict(zip(model.tasks, columns, strict=True))


def evaluate(model: dtme.MultiTaskModel, data: Batches) -> dict[str, float]:
    """{task: its metric over the whole split}."""
    return {task: meter.compute() for task, meter in scored(model, data.tasks, data).items()}
