"""The benchmarks' metrics as meters: ``update(prediction, target)`` a batch, ``compute()`` -> float, ``reset()``.

Every meter keeps sums over the whole split, so the result does not depend on how the split is cut into batches.
Predictions are a head's raw output, (B, C, H, W); targets are as in ``losses``. Sums are float64 or int64, on the CPU.
A meter that has seen no valid pixel computes NaN.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rooms.labels import IGNORE


class Meter(ABC):
    """Sums over a split: ``update`` adds a batch's ``counts``, ``compute`` turns the sums into the metric."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._sums = torch.zeros(shape, dtype=torch.float64)

    def reset(self) -> None:
        self._sums.zero_()

    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor) -> None:
        self._sums += self._count(prediction.detach(), target).double().cpu()

    @abstractmethod
    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        """What one batch adds to the sums."""

    @abstractmethod
    def compute(self) -> float:
        """The metric of everything seen so far."""


class MeanIoU(Meter):
    """mIoU in %: intersection over union of every class from one confusion matrix, averaged over classes.

    A class that neither the targets nor the predictions contain has no IoU and is left out of the average, one that
    is only predicted counts as 0: torchmetrics' ``MulticlassJaccardIndex``, whose package imports only where the
    installed torchvision suits torch. Pixels with target 255 are left out.
    """

    def __init__(self, classes: int) -> None:
        super().__init__((classes, classes))

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        classes = len(self._sums)
        valid = target != IGNORE
        pair = target[valid] * classes + prediction.argmax(1)[valid]
        return torch.bincount(pair, minlength=classes**2).view(classes, classes)

    def compute(self) -> float:
        hit = self._sums.diagonal()
        union = self._sums.sum(0) + self._sums.sum(1) - hit
        return 100 * (hit / union)[union > 0].mean().item()


class DepthRMSE(Meter):
    """RMSE in metres: root of the squared sum over all pixels of the split with target > 0."""

    def __init__(self) -> None:
        super().__init__((2,))

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        valid = target > 0
        return torch.stack([(prediction - target)[valid].double().square().sum(), valid.sum()])

    def compute(self) -> float:
        return (self._sums[0] / self._sums[1]).sqrt().item()


class NormalsError(Meter):
    """mErr in degrees: mean of 2 atan2(|p - g|, |p + g|) on unit vectors; a target of zeros is left out."""

    def __init__(self) -> None:
        super().__init__((2,))

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        p, g = F.normalize(prediction.double(), dim=1), F.normalize(target.double(), dim=1)
        angle = 2 * torch.atan2((p - g).norm(dim=1), (p + g).norm(dim=1))
        valid = (target != 0).any(1)
        return torch.stack([angle[valid].rad2deg().sum(), valid.sum()])

    def compute(self) -> float:
        return (self._sums[0] / self._sums[1]).item()


class EdgeF(Meter):
    """F in % at a fixed threshold: an edge is a probability above ``threshold``; counts over the split.

    A predicted edge pixel is right, and a true one is found, when the other map has an edge at most ``tolerance``
    pixels away along each axis (0: the same pixel). The default, 1, is NYUD-v2's 0.011 of the diagonal at 64 × 64;
    unlike odsF, nothing is thinned or matched one to one. Pixels with target 255 are left out.
    """

    def __init__(self, tolerance: int = 1, threshold: float = 0.5) -> None:
        super().__init__((4,))
        self._tolerance = tolerance
        self._logit = math.log(threshold / (1 - threshold))

    def _near(self, edge: Tensor) -> Tensor:
        return F.max_pool2d(edge.float(), 2 * self._tolerance + 1, 1, self._tolerance) > 0

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        truth = target == 1
        found = (prediction > self._logit) & (target != IGNORE)
        right, recalled = found & self._near(truth), truth & self._near(found)
        return torch.stack([right.sum(), found.sum(), recalled.sum(), truth.sum()])

    def compute(self) -> float:
        right, found, recalled, truth = self._sums.tolist()
        if found + truth == 0:
            return float("nan")
        # 2PR / (P + R) with P = right / found, R = recalled / truth, multiplied out: no 0 / 0 when nothing is found
        return 100 * 2 * right * recalled / max(right * truth + recalled * found, 1)


class MaxF(Meter):
    """maxF in %: F with β² = 0.3 at thresholds 0.05, 0.10 … 0.95, from counts over the split; the highest.

    Prediction: two logits, softmax. ``mode="invpt"`` passes the probability through a sigmoid again, as InvPT does.
    Pixels with target 255 are left out.
    """

    BETA2 = 0.3

    def __init__(self, mode: Literal["plain", "invpt"] = "plain") -> None:
        if mode not in ("plain", "invpt"):
            raise ValueError(f"mode must be 'plain' or 'invpt', got {mode!r}")
        super().__init__((3, 19))
        self._mode = mode

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        valid = target != IGNORE
        probability = prediction.double().softmax(1)[:, 1][valid]
        if self._mode == "invpt":
            probability = probability.sigmoid()
        thresholds = torch.arange(1, 20, dtype=torch.float64, device=prediction.device) / 20
        found, truth = probability > thresholds[:, None], target[valid] == 1
        return torch.stack([(found & truth).sum(1), found.sum(1), truth.sum().expand(19)])

    def compute(self) -> float:
        right, found, truth = self._sums
        if truth[0] + found.sum() == 0:
            return float("nan")
        # (1 + β²) PR / (β² P + R) with P = right / found, R = right / truth, multiplied out
        f = (1 + self.BETA2) * right / (self.BETA2 * truth + found).clamp(min=self.BETA2)
        return 100 * f.max().item()


def delta_m(
    results: Mapping[str, float], baseline: Mapping[str, float], lower_is_better: Collection[str]
) -> tuple[float, dict[str, float]]:
    """Δm = 100/K Σ_i (-1)^{l_i} (M_i - B_i) / B_i: the mean gain over the single-task runs in %, and its terms.

    Args:
        results: task -> metric of the multi-task model.
        baseline: task -> metric of our own single-task run.
        lower_is_better: the tasks with l_i = 1.

    Returns:
        (total, {task: term}), in %; positive is better, and the total is the mean of the terms.
    """
    if not results or results.keys() != baseline.keys():
        raise ValueError(f"results and baseline must name the same tasks, got {sorted(results)} and {sorted(baseline)}")
    zero = [task for task, value in baseline.items() if value == 0]
    if zero:
        raise ValueError(f"baseline must not be zero, it is for {zero}")
    terms = {
        task: (-100 if task in lower_is_better else 100) * (results[task] - base) / base
        for task, base in baseline.items()
    }
    return sum(terms.values()) / len(terms), terms
