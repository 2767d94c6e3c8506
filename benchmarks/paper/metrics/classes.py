"""Metrics of a choice among classes; both are read off one confusion matrix."""

from torch import Tensor

from ...clients import import_torchvision
from ...rooms.labels import IGNORE
from .meter import CLASS_PER_PIXEL, Layout, Meter


class _Confusion(Meter):
    """Counts of (true class, predicted class) by torchmetrics; elements with target 255 are left out."""

    def __init__(self, classes: int, prediction: Layout, target: Layout) -> None:
        if not 1 < classes <= IGNORE:
            raise ValueError(f"classes must be 2 to {IGNORE}, for {IGNORE} is the label of none, got {classes}")
        super().__init__((classes, classes), prediction, target, labels=classes)

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        import_torchvision()
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        return multiclass_confusion_matrix(
            prediction, target.long(), len(self._sums), ignore_index=IGNORE, validate_args=False
        )


class MeanIoU(_Confusion):
    """mIoU in %: intersection over union of every class, from the counts of the split, averaged over classes.

    A class that neither the targets nor the predictions contain has no IoU and is left out of the average, one that
    is only predicted counts as 0: torchmetrics' ``MulticlassJaccardIndex``, of which the last step is done here in
    float64. Prediction (B, classes, H, W), target (B, H, W) of whole numbers; pixels with target 255 are left out.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes, ("B", classes, "H", "W"), CLASS_PER_PIXEL)

    def compute(self) -> float:
        hit = self._sums.diagonal()
        union = self._sums.sum(0) + self._sums.sum(1) - hit
        return 100 * (hit / union)[union > 0].mean().item()


class Accuracy(_Confusion):
    """Share of the items whose class has the highest score, in %.

    Prediction (B, classes), target (B,) of whole numbers; items with target 255 are left out.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes, ("B", classes), ("B",))

    def compute(self) -> float:
        return 100 * (self._sums.trace() / self._sums.sum()).item()
