"""The benchmarks' metrics as meters: ``update(prediction, target)`` a batch, ``compute()`` -> float, ``reset()``.

Predictions are a head's raw output, targets are as in ``losses``. ``Meter`` says what all of them have in common.
"""

from .boundaries import BoundaryF
from .classes import Accuracy, MeanIoU
from .edges import EdgeF
from .meter import Meter
from .regression import DepthRMSE, DirectionL1, L1Error, NormalsError, RootMeanSquareError
from .saliency import MaxF

__all__ = [
    "Accuracy",
    "BoundaryF",
    "DepthRMSE",
    "DirectionL1",
    "EdgeF",
    "L1Error",
    "MaxF",
    "MeanIoU",
    "Meter",
    "NormalsError",
    "RootMeanSquareError",
]
