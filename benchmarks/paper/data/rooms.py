"""The rendered rooms as a data set of the evaluation."""

from ...rooms.labels import CLASSES
from .. import losses
from ..metrics import DepthRMSE, EdgeF, MaxF, MeanIoU, NormalsError
from ..tasks import Task

TASKS = {
    "semseg": Task(
        len(CLASSES["semseg"]),
        losses.cross_entropy,
        lambda: MeanIoU(len(CLASSES["semseg"])),
        "mIoU",
        "%",
        lower_is_better=False,
        classes=CLASSES["semseg"],
    ),
    "depth": Task(1, losses.depth_loss, DepthRMSE, "RMSE", "m", lower_is_better=True),
    "normals": Task(3, losses.normals_loss, NormalsError, "mErr", "°", lower_is_better=True, weight=10),
    # at 64 × 64 a tolerance of one pixel covers half the image; and the loss weighs edges 19 : 1, so that a probability
    # of 0.5 stands for an edge that is one in twenty times
    "edges": Task(
        1,
        losses.edge_loss,
        lambda: EdgeF(tolerance=0, threshold=0.8),
        "F",
        "%",
        lower_is_better=False,
        weight=50,
    ),
    "saliency": Task(
        len(CLASSES["saliency"]),
        losses.balanced_cross_entropy,
        MaxF,
        "maxF",
        "%",
        lower_is_better=False,
        classes=CLASSES["saliency"],
        weight=5,
    ),
    "parts": Task(
        len(CLASSES["parts"]),
        losses.cross_entropy,
        lambda: MeanIoU(len(CLASSES["parts"])),
        "mIoU",
        "%",
        lower_is_better=False,
        classes=CLASSES["parts"],
        weight=2,
    ),
}
