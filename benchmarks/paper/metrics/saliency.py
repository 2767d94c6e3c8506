"""The metric of saliency."""

from typing import Literal

import torch
from torch import Tensor

from ...rooms.labels import IGNORE
from .meter import CLASS_PER_PIXEL, Meter


class MaxF(Meter):
    """maxF in %: F with β² = 0.3 at thresholds 0.05, 0.10 … 0.95, from counts over the split; the highest.

    Prediction: two logits, softmax. ``mode="invpt"`` passes the probability through a sigmoid again, as InvPT does.
    Pixels with target 255 are left out.
    """

    BETA2 = 0.3

    def __init__(self, mode: Literal["plain", "invpt"] = "plain") -> None:
        if mode not in ("plain", "invpt"):
            raise ValueError(f"mode must be 'plain' or 'invpt', got {mode!r}")
        super().__init__((3, 19), ("B", 2, "H", "W"), CLASS_PER_PIXEL, labels=2)
        self._mode = mode

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        valid = target != IGNORE
        probability = prediction.double().softmax(1)[:, 1][valid]
        if self._mode == "invpt":
            probability = probability.sigmoid()
        thresholds = torch.arange(1, 20, dtype=torch.float64, device=prediction.device) / 20
        predicted, truth = probability > thresholds[:, None], target[valid] == 1
        return torch.stack([(predicted & truth).sum(1), predicted.sum(1), truth.sum().expand(19)])

    def compute(self) -> float:
        right, predicted, truth = self._sums
        if truth[0] + predicted.sum() == 0:
            return float("nan")
        # (1 + β²) PR / (β² P + R) with P = right / predicted, R = right / truth, multiplied out
        f = (1 + self.BETA2) * right / (self.BETA2 * truth + predicted).clamp(min=self.BETA2)
        return 100 * f.max().item()
