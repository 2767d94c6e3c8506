"""The benchmarks' losses: ``loss(prediction, target)`` -> float32 scalar; zero, with a graph, where no pixel is valid.

Predictions are a head's raw output, (B, C, H, W); targets are the data set's, stacked. A target of another shape than a
loss takes is a ValueError: tensors that merely can be broadcast against each other would give a wrong loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rooms.labels import IGNORE


def _mean(loss: Tensor, valid: Tensor) -> Tensor:
    """Sum of ``loss`` over the pixels that are valid, over their number; never 0 / 0."""
    return torch.where(valid, loss, 0.0).sum() / valid.sum().clamp(min=1)


def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """semseg, parts: cross-entropy over valid pixels. Target (B, H, W) int64, 255 ignored."""
    return _mean(F.cross_entropy(prediction.float(), target, ignore_index=IGNORE, reduction="none"), target != IGNORE)


def balanced_cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """saliency: 2-class cross-entropy, each class weighted by the other's share of the batch. Target as above."""
    valid = target != IGNORE
    positive = _mean((target == 1).float(), valid)
    weight = torch.where(target == 1, 1 - positive, positive)
    return _mean(weight * F.cross_entropy(prediction.float(), target, ignore_index=IGNORE, reduction="none"), valid)


def edge_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """edge: binary cross-entropy weighted 0.95 (edge) / 0.05 (none). Target (B, 1, H, W) in {0, 1}, 255 ignored."""
    _check_same_shape(prediction, target)
    valid = target != IGNORE
    truth = torch.where(valid, target, 0.0)
    weight = torch.where(truth > 0.5, 0.95, 0.05)
    return _mean(F.binary_cross_entropy_with_logits(prediction.float(), truth, weight, reduction="none"), valid)


def normals_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """normals: L1 on the normalised prediction, summed over channels, over valid pixels. Target 0 0 0 is invalid."""
    _check_same_shape(prediction, target)
    valid = (target != 0).any(1)
    return _mean((F.normalize(prediction.float(), dim=1) - target).abs().sum(1), valid)


def depth_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """depth: L1 over valid pixels. Target (B, 1, H, W) in metres, valid where > 0."""
    error, valid = _error(prediction, target, target > 0)
    return _mean(error.abs(), valid)


def l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Taskonomy: L1, the mean over valid values. Target (B, C, H, W), NaN where it is unknown."""
    error, valid = _error(prediction, target, ~target.isnan())
    return _mean(error.abs(), valid)


def mse_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Taskonomy's curvature: the mean square over valid values. Target as of ``l1_loss``."""
    error, valid = _error(prediction, target, ~target.isnan())
    return _mean(error.square(), valid)


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Taskonomy's normals: 1 - cos of the angle between the vectors of a pixel, whose components are its channels,
    over valid pixels. Target (B, 3, H, W) of any length, NaN or 0 0 0 where it is unknown."""
    _check_same_shape(prediction, target)
    valid = (target.isfinite() & (target != 0).any(1, keepdim=True)).all(1)
    known = torch.where(valid[:, None], target, 0.0)
    return _mean(1 - F.cosine_similarity(prediction.float(), known.float(), dim=1), valid)


def _error(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Difference, and where it is valid. An invalid target is replaced before it meets the prediction: a NaN that is
    masked afterwards would still be multiplied into the gradient."""
    _check_same_shape(prediction, target)
    return prediction.float() - torch.where(valid, target, 0.0).float(), valid


def _check_same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have the same shape, got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
