"""The losses with the labels of other images, which tell whether the heads have learnt anything.

Rates of untrained heads are those of one random draw of heads, and are about the same whatever the labels are. No rate
shows that, and no resampling of batches does; the losses do, of each task by itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..heads import HEAD_BATCHES as HEAD_BATCHES
from ..randomness import random_state, wind_back
from ..trees import leaves, map_tensors, tensors


def labels_of_others(target: Any) -> Any:
    """The labels of a batch of two images at least, each of which gets those of the one half a batch before it.

    Neighbours are often alike, as frames of a film are, where nothing shuffles them.
    """
    return map_tensors(lambda leaf: leaf.roll(len(leaf) // 2, 0), target)


def loss_of_others(loss: Callable[[Any, Any], Tensor], x: Any, prediction: Any, target: Any) -> Callable[[], float]:
    """The loss with the labels of other images, to be taken after the loss itself.

    What it is of is copied at once, because a loss may write into its arguments, and it leaves random numbers where
    they are: all else is as if it had not been taken.

    Returns:
        A function that takes it; NaN where labels are not told apart by image, where the other images of a batch have
        the same ones, and where the loss raises an error, as one that differentiates inside does here.
    """
    if not _by_image(x, target):
        return lambda: math.nan
    others = labels_of_others(target)
    if all(torch.equal(own, other) for own, other in zip(tensors(target), tensors(others), strict=True)):
        return lambda: math.nan
    prediction = map_tensors(lambda leaf: leaf.detach().clone(), prediction)

    def take() -> float:
        state = random_state()
        try:
            with torch.no_grad():
                return float(loss(prediction, others))
        except Exception:  # no user asked for this loss: that it cannot be taken must not end an analysis
            return math.nan
        finally:
            wind_back(state)

    return take


def _by_image(x: Any, target: Any) -> bool:
    """Whether ``target`` is tensors that all have a row for each image of ``x``, of which there are two or more.

    The boxes of all images in one tensor do not, and a list of images that have equally many boxes does not.
    """
    labels = [leaf for leaf in leaves(target) if leaf is not None]
    if not all(isinstance(leaf, Tensor) and leaf.ndim and leaf.layout == torch.strided for leaf in labels):
        return False
    sizes = {len(leaf) for leaf in labels}
    return len(sizes) == 1 and min(sizes) > 1 and sizes <= {len(leaf) for leaf in tensors(x) if leaf.ndim}


class HeadLosses:
    """The losses of the first batches, with the images' own labels and with those of others."""

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        self.rows: list[Tensor] = []
        """(K, 2) float64 of a batch: own, others'; NaN where a task had none."""

    def add(self, index: Sequence[int], own: Tensor, swapped: Tensor) -> None:
        """Those of the tasks ``index`` in one batch, which may be all NaN: it is then left out."""
        if bool(swapped.isfinite().any()):
            row = torch.full((self.num_tasks, 2), math.nan, dtype=torch.float64)
            row[list(index)] = torch.stack([own, swapped], 1)
            self.rows.append(row)
