"""What every meter is: sums over a split, and what is asked of a batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...rooms.labels import IGNORE

Layout = Sequence[int | str]
"""Sizes of a tensor's dimensions: a number, or a letter that is the same number wherever it stands."""
CLASS_PER_PIXEL: Layout = ("B", "H", "W")
NUMBER_PER_PIXEL: Layout = ("B", 1, "H", "W")


class Meter(ABC):
    """A metric of a split: ``update(prediction, target)`` a batch, ``compute()`` -> float, ``reset()``.

    A meter keeps sums over the whole split, in float64 and on the CPU, so that the result does not depend on how the
    split is cut into batches; all sums of whole numbers are exact. A meter that has seen nothing valid computes NaN.
    It can be pickled between two batches, and the copy goes on from there.

    Args:
        shape: of the sums.
        prediction: layout of a batch's prediction, a head's raw output.
        target: layout of its labels.
        labels: how many classes the labels are of, 255 aside; 0 where they are no classes.
    """

    def __init__(self, shape: tuple[int, ...], prediction: Layout, target: Layout, labels: int = 0) -> None:
        self._sums = torch.zeros(shape, dtype=torch.float64)
        self._layouts = (tuple(prediction), tuple(target))
        self._labels = labels

    def reset(self) -> None:
        self._sums.zero_()

    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch.

        Raises:
            ValueError: a shape that does not fit, a prediction that is NaN or infinite, a label that is none. The sums
                are as they were.
        """
        self._check_shapes(prediction, target)
        if not prediction.isfinite().all():
            where = (~prediction.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"{self._name}: {int((~prediction.isfinite()).sum())} of {prediction.numel()} predictions are NaN or "
                f"infinite, the first at {where}: the model has diverged, or overflows in its dtype, {prediction.dtype}"
            )
        self._check_labels(target)
        counts = self._count(prediction.detach(), target).double().cpu()
        if not counts.isfinite().all():
            raise ValueError(f"{self._name}: a target is NaN or infinite, or so large that its square is")
        self._sums += counts

    def all_reduce_(self, group: Any = None) -> None:
        """Sum over the processes of ``group`` (None: all); then ``compute`` gives every one the metric of all shards.

        Every process calls it, once, after its last batch: a second call would count everything once more for every
        process. Nothing happens where ``torch.distributed`` is not in use.
        """
        if dist.is_available() and dist.is_initialized():
            sums = self._sums.to("cuda" if "nccl" in dist.get_backend(group) else "cpu")
            dist.all_reduce(sums, group=group)
            self._sums = sums.cpu()

    @abstractmethod
    def compute(self) -> float:
        """The metric of everything seen so far."""

    @abstractmethod
    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        """What one batch adds to the sums."""

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_shapes(self, prediction: Tensor, target: Tensor) -> None:
        sizes: dict[int | str, int] = {}
        for layout, tensor in zip(self._layouts, (prediction, target), strict=True):
            fits = len(layout) == tensor.ndim
            for want, size in zip(layout, tensor.shape, strict=False):
                fits = fits and size == (want if isinstance(want, int) else sizes.setdefault(want, size))
            if not fits:
                wanted = " and ".join(f"({', '.join(map(str, layout))})" for layout in self._layouts)
                raise ValueError(
                    f"{self._name}: prediction and target must be {wanted}, "
                    f"got {tuple(prediction.shape)} and {tuple(target.shape)}"
                )

    def _check_labels(self, target: Tensor) -> None:
        if not self._labels:
            return
        wrong = (target < 0) | (target >= self._labels)
        if target.is_floating_point():
            wrong |= target != target.round()
        wrong &= target != IGNORE
        if wrong.any():
            raise ValueError(
                f"{self._name}: labels must be 0 to {self._labels - 1}, or {IGNORE} for none, "
                f"got {target[wrong][0].item():g}"
            )
