"""Edges by a fixed threshold and tolerance: a quick metric, for small images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rooms.labels import IGNORE
from .meter import NUMBER_PER_PIXEL, Meter


class EdgeF(Meter):
    """F in % at a fixed threshold: an edge is a probability above ``threshold``; counts over the split.

    A predicted edge pixel is right, and a true one is found, when the other map has an edge at most ``tolerance``
    pixels away along each axis (0: the same pixel). The default, 1, is NYUD-v2's 0.011 of the diagonal at 64 × 64;
    unlike odsF, nothing is thinned or matched one to one. Pixels with target 255 are left out.
    """

    def __init__(self, tolerance: int = 1, threshold: float = 0.5) -> None:
        super().__init__((4,), NUMBER_PER_PIXEL, NUMBER_PER_PIXEL, labels=2)
        self._tolerance = tolerance
        self._logit = math.log(threshold / (1 - threshold))

    def _near(self, edge: Tensor) -> Tensor:
        return F.max_pool2d(edge.float(), 2 * self._tolerance + 1, 1, self._tolerance) > 0

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        truth = target == 1
        predicted = (prediction > self._logit) & (target != IGNORE)
        right, recalled = predicted & self._near(truth), truth & self._near(predicted)
        return torch.stack([right.sum(), predicted.sum(), recalled.sum(), truth.sum()])

    def compute(self) -> float:
        right, predicted, recalled, truth = self._sums.tolist()
        if predicted + truth == 0:
            return float("nan")
        # 2PR / (P + R) with P = right / predicted, R = recalled / truth, multiplied out: no 0 / 0 when nothing is found
        return 100 * 2 * right * recalled / max(right * truth + recalled * predicted, 1)
