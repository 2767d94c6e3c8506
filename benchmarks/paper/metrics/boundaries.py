"""The metric of boundaries: odsF, in process."""

import numpy as np
import torch
from torch import Tensor

from ...rooms.labels import IGNORE
from .contours import Matcher, suppress, thin
from .meter import Layout, Meter

PIXEL: Layout = ("B", 1, "H", "W")
THRESHOLDS = np.arange(1, 100) / 100


class BoundaryF(Meter):
    """odsF in %."""

    def __init__(self, max_distance: float) -> None:
        if not 0 < max_distance < 1:
            raise ValueError(f"max_distance is a share of the image's diagonal, between 0 and 1, got {max_distance}")
        super().__init__((3, len(THRESHOLDS)), PIXEL, PIXEL, labels=2)
        self._max_distance = max_distance

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        probability = prediction.double().sigmoid().cpu().numpy()
        labels = target.cpu().numpy()
        counts = [self._count_image(p, y) for (p,), (y,) in zip(probability, labels, strict=True)]
        return torch.from_numpy(np.sum(counts, axis=0)) if counts else torch.zeros_like(self._sums)

    def _count_image(self, probability: np.ndarray, label: np.ndarray) -> np.ndarray:
        """[matched, predicted, true] pixels at every threshold."""
        counts = np.zeros((3, len(THRESHOLDS)))
        known = label != IGNORE
        if not known.any():
            return counts
        rows, columns = (np.flatnonzero(known.any(axis)) for axis in (1, 0))
        image = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        probability, truth, known = probability[image], label[image] == 1, known[image]
        strength = np.where(known, suppress(probability), 0)
        matcher = Matcher(truth, self._max_distance * float(np.hypot(*truth.shape)))
        counts[2] = truth.sum()
        for i, threshold in enumerate(THRESHOLDS):
            found = thin(strength >= threshold)
            counts[:2, i] = matcher.count(found), found.sum()
        return counts

    def compute(self) -> float:
        right, found, truth = self._sums
        if truth[0] + found.sum() == 0:
            return float("nan")
        # 2PR / (P + R) with P = right / found, R = right / truth, multiplied out: no 0 / 0 when nothing is found
        return 100 * (2 * right / (found + truth).clamp(min=1)).max().item()
