"""What paired differences decide, and how many seeds would decide what they do not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .statistics import Estimate, estimate, seeds_needed

MARGIN = 0.5
"""Points of Δm below which nobody would change a model: an interval within ± this is no difference."""
BETTER, WORSE, EQUAL, OPEN = "better", "worse", "no difference", "not settled"


@dataclass(frozen=True)
class Verdict:
    """What the 95 % interval of a mean difference says.

    Attributes:
        word: ``BETTER`` or ``WORSE`` where the interval is on one side of zero, ``EQUAL`` where it lies within the
            margin on both, else ``OPEN``. Differences that are all the same, and not zero, leave it open: a spread of
            zero is that of a coarse metric or of one run under several seeds.
        difference: the mean difference over the seeds, in points, higher is better.
        margin: of ``EQUAL``, in points.
        seeds: in all, with which a paired t-test settles it at a power of 80 % if the mean stays what it is: by finding
            that mean, or what is between it and the margin, whichever is larger; NaN where the spread is not known,
            which takes two seeds.
    """

    word: str
    difference: Estimate
    margin: float
    seeds: float

    @property
    def is_settled(self) -> bool:
        return self.word != OPEN

    @property
    def more(self) -> float:
        """Seeds that are still to be run to settle it, at least one; 0 where it is settled, NaN where unknown."""
        if self.is_settled:
            return 0
        return self.seeds if math.isnan(self.seeds) else max(1, self.seeds - self.difference.n)


def verdict(differences: Sequence[float], margin: float = MARGIN) -> Verdict:
    """Of paired differences by seed, in points of Δm where nothing else is said, higher is better.

    Raises:
        ValueError: a difference is not finite, or ``margin`` not positive and finite.
    """
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin must be a positive number of points, got {margin!r}")
    found = estimate(differences)
    needed = seeds_needed(found.sd, max(abs(found.mean), margin - abs(found.mean))) if found.n > 1 else math.nan
    word = OPEN
    if found.low > 0 and found.sd > 0:
        word = BETTER
    elif found.high < 0 and found.sd > 0:
        word = WORSE
    elif -margin < found.low and found.high < margin:
        word = EQUAL
    return Verdict(word, found, margin, needed)
