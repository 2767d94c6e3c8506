"""The metric of boundaries: odsF, in process."""

import numpy as np
import torch
from torch import Tensor

from ...rooms.labels import IGNORE
from .contours import Matcher, suppress, thin
from .meter import NUMBER_PER_PIXEL, Meter

THRESHOLDS = np.arange(1, 100) / 100


class BoundaryF(Meter):
    """odsF in %: F of thinned boundaries paired one to one with true ones, at the best of 99 thresholds for all images.

    It is the score of the boundary benchmarks (Martin, Fowlkes and Malik, 2004; Dollár and Zitnick, 2015), which else
    needs Matlab. For every image: the probabilities are smoothed and suppressed where they are no maximum across the
    contour (``contours.suppress``); at every threshold 0.01, 0.02 ... 0.99, what is at least as high is thinned to
    lines of one pixel and paired with true pixels within reach, as many as can be (``contours.Matcher``). Pairs,
    predicted and true pixels are summed over the split, precision and recall follow from the sums, and the result is
    the highest F of the thresholds; it is not interpolated between them.

    - The truth is taken as it is. Where it is thicker than a pixel, nothing reaches 100, for predictions are thinned.
    - The image is the smallest rectangle with all pixels that are not 255: padding with 255 has no part in its
      diagonal, nor in the five pixels at its border where predictions fade. Within it, what is predicted on a pixel
      with 255 is dropped after the suppression: it is neither wrong nor paired.
    - An image without true edges counts whatever is predicted as wrong. A split with neither true nor predicted edges
      has no F: NaN.

    An image of 425 × 560 takes about a second on one core; one that is noise all over, as before training, up to five.

    Prediction: logits (B, 1, H, W). Target (B, 1, H, W) in {0, 1}, 255 ignored.

    Args:
        max_distance: how far apart a pair may be, as a share of the image's diagonal: 0.0075 for PASCAL-Context and
            0.011 for NYUD-v2.
    """

    def __init__(self, max_distance: float) -> None:
        if not 0 < max_distance < 1:
            raise ValueError(f"max_distance must be a share of the image's diagonal in (0, 1), got {max_distance}")
        super().__init__((3, len(THRESHOLDS)), NUMBER_PER_PIXEL, NUMBER_PER_PIXEL, labels=2)
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
        strength = np.where(known, suppress(probability, THRESHOLDS[0]), 0)
        matcher = Matcher(strength >= THRESHOLDS[0], truth, self._max_distance * float(np.hypot(*truth.shape)))
        counts[2] = truth.sum()
        pixels = -1
        for i, threshold in enumerate(THRESHOLDS):
            above = strength >= threshold
            if above.sum() != pixels:  # each map is a part of the one before: with as many pixels, the same
                pixels, found = above.sum(), thin(above)
                here = matcher.count(found), found.sum()
            counts[:2, i] = here
        return counts

    def compute(self) -> float:
        right, found, truth = self._sums
        if truth[0] + found.sum() == 0:
            return float("nan")
        # 2PR / (P + R) with P = right / found, R = right / truth, multiplied out: no 0 / 0 when nothing is found
        return 100 * (2 * right / (found + truth).clamp(min=1)).max().item()
