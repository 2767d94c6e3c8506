"""Under which conditions joint training is compared with single-task runs: each is a folder of runs."""

from dataclasses import dataclass

from ..report.folder import SINGLE
from ..runner.tune import JOINT

WEIGHTINGS = ("invpt-weights", "uw")
"""Arms that train jointly and weigh the losses."""
DECAY = 1e-3
"""Weight decay of the condition that changes it."""
TUNED, DOUBLE, UNTUNED, DECAYED = "tuned", "double", "untuned", "decay"


@dataclass(frozen=True)
class Condition:
    """What all runs of a folder have in common."""

    key: str
    folder: str
    """Name of the folder."""
    title: str
    arms: tuple[str, ...]
    steps: int
    is_tuned: bool = False
    """Whether the learning rate of every arm, and of every task alone, is tuned under this condition."""
    rates_of: str | None = None
    """Key of the condition whose tuned rates are used; None without ``is_tuned``: every run has the default rate."""
    weight_decay: float | None = None
    """None for that of all conditions."""


def conditions(steps: int) -> dict[str, Condition]:
    """All conditions by their keys, in the order in which they are run; ``steps`` is the single number of steps."""
    both = (SINGLE, JOINT)
    found = (
        Condition(TUNED, f"steps-{steps}", f"tuned, {steps} steps", (*both, *WEIGHTINGS), steps, is_tuned=True),
        Condition(DOUBLE, f"steps-{2 * steps}", f"the same rates, {2 * steps} steps", both, 2 * steps, rates_of=TUNED),
        Condition(UNTUNED, "untuned", "default rate", both, steps),
        Condition(DECAYED, "decay", f"tuned, weight decay {DECAY:g}", both, steps, rates_of=TUNED, weight_decay=DECAY),
    )
    return {condition.key: condition for condition in found}
