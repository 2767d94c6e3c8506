"""What the losses of a report say about the heads: whether they know which labels belong to which image."""

import math
from typing import TYPE_CHECKING

from .resampling import LEVEL, student_quantile

if TYPE_CHECKING:
    from .report import ConflictReport


def label_gains(report: "ConflictReport") -> dict[str, tuple[float, float]]:
    """{task: (gain, half of its interval)}; see ``ConflictReport.label_gains``."""
    if report.head_losses is None:
        return dict.fromkeys(report.tasks, (math.nan, math.nan))
    found = {}
    for task, losses in zip(report.tasks, report.head_losses.unbind(1), strict=True):
        own, others = losses[losses.isfinite().all(1)].unbind(1)
        count, mean = len(own), others.mean().item()
        if count < 2 or not mean:
            found[task] = (math.nan, math.nan)
            continue
        gain = (others - own).mean().item() / abs(mean)
        # the deviation of a ratio of sums, from what each batch adds to it
        rest = (others - own) - gain * others * math.copysign(1, mean)
        half = student_quantile(count - 1, LEVEL) * rest.std().item() / math.sqrt(count) / abs(mean)
        found[task] = (gain, half)
    return found


def untrained(report: "ConflictReport") -> list[str]:
    """The tasks whose gain is known and is not surely above zero."""
    return [task for task, (gain, half) in label_gains(report).items() if gain - half <= 0]
