"""A comparison in words: the table of its arms, the answers, and what to do next."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..tables import aligned, ruled
from .arms import JOINT
from .metrics import HIGHER
from .statistics import LEVEL, Estimate, estimate

if TYPE_CHECKING:
    from .result import Comparison


def summary(comparison: "Comparison") -> str:
    """Everything that there is to say."""
    count, tasks = len(comparison.seeds), list(comparison.tasks)
    seeds = "1 seed" if count == 1 else f"{count} paired seeds"
    lines = [
        f"{len(comparison.arms)} arms on {len(tasks)} tasks over {seeds}: {comparison.budget:,} steps each, the first "
        f"{comparison.start:,} joint",
        "",
        *ruled(arm_rows(comparison)),
        *_legend(count),
        *_learning_rates(comparison),
        *comparison.notes,
    ]
    for arm, reasons in comparison.diverged.items():
        lines += [f"diverged: {arm}, seed {seed}: {why}" for seed, why in reasons.items()]
    undefined = sum(math.isnan(value) for value in comparison.delta_m(JOINT))
    if undefined > len(comparison.diverged.get(JOINT, ())):
        lines.append(
            "Δm is not known where a metric of joint training is not above zero: give metrics that are, as errors"
        )
    lines += ["", *(str(answer) for answer in comparison.answers), "", f"Next: {comparison.next_step}"]
    return "\n".join(lines)


def arm_rows(comparison: "Comparison") -> list[str]:
    """One line for each arm, under a heading."""
    arrows = {task: "↑" if direction == HIGHER else "↓" for task, direction in comparison.tasks.items()}
    rows = [["arm", *(f"{task} {arrows[task]}" for task in comparison.tasks), "Δm %", "added", "compute", "time"]]
    for arm in comparison.arms:
        lost = comparison.diverged.get(arm, ())
        costs = [c for c, seed in zip(comparison.costs[arm], comparison.seeds, strict=True) if seed not in lost]
        delta = "0" if arm == JOINT else with_interval(known(comparison.delta_m(arm)), signed=True)
        rows.append(
            [
                arm,
                *(with_interval(known(comparison.metrics[arm][task])) for task in comparison.tasks),
                delta,
                f"{_mean([cost.added for cost in costs]):,.0f}" if costs else "-",
                _times(_mean([cost.compute for cost in costs])),
                duration(_mean([cost.seconds for cost in costs])) if costs else "-",
            ]
        )
    return aligned(rows, "<" + ">" * (len(rows[0]) - 1))


def known(values: Sequence[float]) -> Estimate:
    """Of those that are there."""
    return estimate([value for value in values if math.isfinite(value)])


def with_interval(of: Estimate, signed: bool = False) -> str:
    """The mean ± half of its interval, to the digits that the interval allows."""
    sign = "+" if signed else ""
    if of.n == 0:
        return "-"
    if not of.half_width > 0:  # one seed, or no spread at all
        return f"{of.mean:{sign}.2f}" if signed else f"{of.mean:.4g}"
    decimals = min(6, max(0, 1 - math.floor(math.log10(of.half_width))))
    return f"{of.mean:{sign}.{decimals}f} ± {of.half_width:.{decimals}f}"


def duration(seconds: float) -> str:
    """In the largest unit that it is more than two of."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _legend(count: int) -> list[str]:
    what = "Δm: the mean gain of the tasks over joint training of the same seed"
    if count == 1:
        return [what, "one seed has no intervals, and cannot decide anything"]
    return [what, f"±: half of the {LEVEL:.0%} interval of a mean over the seeds, each by itself"]


def _learning_rates(comparison: "Comparison") -> list[str]:
    if not comparison.tuning:
        return []
    tried = sorted(next(iter(comparison.tuning.values())))
    chosen = ", ".join(f"{arm} {rate:g}" for arm, rate in comparison.rates.items())
    lines = [f"learning rates, chosen of {', '.join(f'{rate:g}' for rate in tried)} on held-out items: {chosen}"]
    ends = [arm for arm, rate in comparison.rates.items() if rate in (tried[0], tried[-1])]
    if ends:
        lines.append(f"at an end of those that were tried: {', '.join(ends)}; rates beyond it may be better")
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _times(compute: float) -> str:
    return "-" if math.isnan(compute) else f"{compute:.2f} ×"
