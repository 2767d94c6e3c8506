"""Metrics of numbers: roots of mean squares, mean errors, mean angles.

The sums are float64. torchmetrics' MeanAbsoluteError and MeanSquaredError sum in float32: after 1e9 pixels in batches
of 240,000 they are off by 2e-5 of the value, and by how much depends on how the split is cut.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .meter import NUMBER_PER_PIXEL, Layout, Meter


class _Mean(Meter):
    """A sum over valid elements, and their number."""

    def __init__(self, prediction: Layout, target: Layout) -> None:
        super().__init__((2,), prediction, target)

    def compute(self) -> float:
        return (self._sums[0] / self._sums[1]).item()


class DepthRMSE(_Mean):
    """RMSE in metres: root of the squared sum over all pixels of the split with target > 0.

    Prediction and target (B, 1, H, W).
    """

    def __init__(self) -> None:
        super().__init__(NUMBER_PER_PIXEL, NUMBER_PER_PIXEL)

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        valid = target > 0
        return torch.stack([(prediction - target)[valid].double().square().sum(), valid.sum()])

    def compute(self) -> float:
        return super().compute() ** 0.5


class NormalsError(_Mean):
    """mErr in degrees: mean of 2 atan2(|p - g|, |p + g|) on unit vectors; a target of zeros is left out.

    Prediction and target (B, 3, H, W), of any length.
    """

    def __init__(self) -> None:
        super().__init__(("B", 3, "H", "W"), ("B", 3, "H", "W"))

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        p, g = F.normalize(prediction.double(), dim=1), F.normalize(target.double(), dim=1)
        angle = 2 * torch.atan2((p - g).norm(dim=1), (p + g).norm(dim=1))
        valid = (target != 0).any(1)
        return torch.stack([angle[valid].rad2deg().sum(), valid.sum()])


class _Error(_Mean):
    """An error of predictions and targets of any one shape; elements with target NaN are left out."""

    def __init__(self) -> None:
        super().__init__((), ())

    def _check_shapes(self, prediction: Tensor, target: Tensor) -> None:
        if prediction.shape != target.shape:
            raise ValueError(
                f"{self._name}: prediction and target must have the same shape, "
                f"got {tuple(prediction.shape)} and {tuple(target.shape)}"
            )


class L1Error(_Error):
    """Mean absolute error over all elements of the split whose target is not NaN; both of one shape."""

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        valid = ~target.isnan()
        return torch.stack([(prediction - target)[valid].double().abs().sum(), valid.sum()])


class DirectionL1(L1Error):
    """L1 of predictions that are made unit vectors first, for what is trained on a cosine, which leaves lengths open.

    Prediction and target (B, C, ...), whose C components are those of a vector.
    """

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        return super()._count(F.normalize(prediction.double(), dim=1), target)


class RootMeanSquareError(_Error):
    """Root of the mean square error over all elements of the split whose target is not NaN; both of one shape."""

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        valid = ~target.isnan()
        return torch.stack([(prediction - target)[valid].double().square().sum(), valid.sum()])

    def compute(self) -> float:
        return super().compute() ** 0.5
