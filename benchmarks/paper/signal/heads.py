"""Whether the heads had learnt anything when the conflicts were measured, by the losses with other images' labels."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtme.analysis.heads import HEAD_BATCHES, loss_of_others

from ..arms import Batch
from ..results import read_json, write_json
from ..tasks import Tasks


def heads_file(measurement: Path) -> Path:
    """Where they lie, beside the measurement of the same model."""
    return measurement.with_suffix(".heads.json")


class HeadLosses(NamedTuple):
    """Of one model at one moment."""

    tasks: tuple[str, ...]
    losses: Tensor
    """(n, K, 2) float64, of n batches: with the images' own labels, and with those of other images of the batch."""

    def save(self, path: Path) -> None:
        write_json(path, {"tasks": list(self.tasks), "losses": self.losses.tolist()})

    @classmethod
    def load(cls, path: Path) -> "HeadLosses":
        """What ``save`` wrote.

        Raises:
            ValueError: it is something else; the message names it.
        """
        content = read_json(path)
        try:
            found = cls(tuple(content["tasks"]), torch.tensor(content["losses"], dtype=torch.float64))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no losses of heads: {error}. Remove it to measure again") from error
        if found.losses.shape[1:] != (len(found.tasks), 2):
            raise ValueError(f"{path} holds losses of shape {tuple(found.losses.shape)} for {len(found.tasks)} tasks")
        return found


@torch.no_grad()
def head_losses(model: nn.Module, tasks: Tasks, batches: Iterable[Batch]) -> HeadLosses:
    """Those of the first batches that an analysis looks at, the model as it is evaluated."""
    model.eval()
    rows = []
    for _, (x, targets) in zip(range(HEAD_BATCHES), batches, strict=False):
        predictions = model(x)
        row = []
        for name, task in tasks.items():
            of_others = loss_of_others(task.loss, x, predictions[name], targets[name])
            row.append([float(task.loss(predictions[name], targets[name])), of_others()])
        rows.append(row)
    return HeadLosses(tuple(tasks), torch.tensor(rows, dtype=torch.float64))
