"""What the losses of a report say about the heads: whether they know which labels belong to which image."""

import math
from typing import TYPE_CHECKING

from torch import Tensor

from .resampling import LEVEL, student_quantile

if TYPE_CHECKING:
    from .report import ConflictReport

HEAD_BATCHES = 32
"""Of each process: those whose losses are also taken with the labels of other images."""
LEARNT = 0.01
"""The gain that a head has to have surely: those of heads with drawn weights lie within a percent or so of 0."""
UNKNOWN = (math.nan, math.nan)


def label_gains(report: "ConflictReport") -> dict[str, tuple[float, float]]:
    """{task: (gain, half of its interval)}; see ``ConflictReport.label_gains``."""
    if report.head_losses is None:
        return dict.fromkeys(report.tasks, UNKNOWN)
    return dict(zip(report.tasks, map(label_gain, report.head_losses.unbind(1)), strict=True))


def label_gain(losses: Tensor) -> tuple[float, float]:
    """The gain of one task and half of its interval.

    Args:
        losses: (n, 2) of n batches, with the images' own labels and with those of others; NaN where there are none.
    """
    own, others = losses[losses.isfinite().all(1)].unbind(1)
    count = len(own)
    if count < 2:
        return UNKNOWN
    # of losses around 0, such as a negative cosine, those with the labels of others are about 0 and measure nothing
    larger = max(others, own, key=lambda some: abs(some.mean().item()))
    if not (mean := larger.mean().item()):
        return UNKNOWN
    gain = (others - own).mean().item() / abs(mean)
    # the deviation of a ratio of sums, from what each batch adds to it
    rest = (others - own) - gain * larger * math.copysign(1, mean)
    return gain, student_quantile(count - 1, LEVEL) * rest.std().item() / math.sqrt(count) / abs(mean)


def untrained(report: "ConflictReport") -> list[str]:
    """The tasks whose gain is known and is not surely above ``LEARNT``."""
    return [task for task, gain in label_gains(report).items() if not shows_learning(*gain)]


def shows_learning(gain: float, half: float) -> bool:
    """Whether a gain is surely above ``LEARNT``, or not known."""
    return math.isnan(gain) or gain - half > LEARNT
