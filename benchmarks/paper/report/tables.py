"""The tables of a report in Markdown, each with what has to be known to read it."""

import math

from dtme.comparison.statistics import Requirement, estimate

from .comparison import SPACES, ArmResult, Comparison, Cost
from .folder import SINGLE
from .text import DASH, bold, decimals, integer, interval, listed, memory, plain, seconds, table

READING = (
    "Intervals are 95 % intervals of the mean over seeds, mean ± half-width, from Student's t; – is what is not "
    "known, as any spread of fewer than two seeds. A number in brackets is the number of seeds, where a number is of "
    "other seeds than the row's. Bold is significantly better than {baseline} at 5 %, two-sided, by the paired "
    "difference over the seeds that both have, with Holm's correction over the arms of the column; arms that diverged "
    "at a seed are never bold."
)


def _values(by_seed: dict[int, float]) -> list[float]:
    return list(by_seed.values())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def main_table(comparison: Comparison) -> str:
    """One row per arm: metrics, Δm, its paired difference to the baseline, and what the arm costs."""
    folder, base = comparison.folder, comparison.arms[comparison.baseline]
    head = [
        "arm",
        *(task.heading for task in folder.tasks.values()),
        "Δm % ↑",
        f"Δm − {base.title}, points (seeds)",
        "seeds",
        "added parameters",
        "training s",
        f"× {base.title}",
        "peak memory",
    ]
    digits = {task: _task_decimals(comparison, task) for task in folder.tasks}
    rows = []
    for arm in comparison.arms.values():
        row = [arm.title]
        for task, by_seed in arm.metrics.items():
            text = interval(estimate(_values(by_seed)), digits[task], of=len(arm.seeds))
            test = comparison.task_differences[task].get(arm.name)
            row.append(bold(text, test is not None and test.is_better))
        test = comparison.differences.get(arm.name)
        is_better = test is not None and test.is_better
        row.append(bold(_delta(comparison, arm), is_better))
        row.append(_difference(comparison, arm))
        rows.append([*row, _seeds(comparison, arm), *_costs(arm, base)])
    return table(head, rows)


def _task_decimals(comparison: Comparison, task: str) -> int:
    return decimals(value for arm in comparison.arms.values() for value in arm.metrics[task].values())


def _delta(comparison: Comparison, arm: ArmResult) -> str:
    if arm.name == comparison.reference:
        return plain(0.0, 2) if arm.delta_m else DASH
    return interval(estimate(_values(arm.delta_m)), 2, sign=True, of=len(arm.seeds))


def _difference(comparison: Comparison, arm: ArmResult) -> str:
    if arm.name == comparison.baseline:
        return "baseline"
    test = comparison.differences[arm.name]
    e = test.difference
    return bold(f"{interval(e, 2, sign=True)} ({e.n})", test.is_better) if e.n else DASH


def _seeds(comparison: Comparison, arm: ArmResult) -> str:
    planned, done = len(comparison.folder.seeds), len(arm.seeds)
    text = f"{done}" if done == planned else f"{done} of {planned}"
    return f"{text}, {len(arm.diverged)} diverged" if arm.diverged else text


def _costs(arm: ArmResult, base: ArmResult) -> list[str]:
    costs = list(arm.costs.values())
    both = [seed for seed in arm.costs if seed in base.costs]
    own, other = (sum(of.costs[seed].training for seed in both) for of in (arm, base))
    return [
        _added(costs),
        seconds(_mean([cost.training for cost in costs])),
        plain(own / other if other else math.nan, 2),
        memory(_mean([cost.memory for cost in costs])),
    ]


def _added(costs: list[Cost]) -> str:
    added, share = _mean([c.added for c in costs]), _mean([100 * c.added / c.base for c in costs if c.base])
    return DASH if math.isnan(added) else f"{integer(added)} ({plain(share, 3)} %)"


def terms_table(comparison: Comparison) -> str:
    """The terms of Δm: every task's own gain over the reference in %."""
    rows = []
    for arm in comparison.arms.values():
        if arm.name != comparison.reference:
            cells = [interval(estimate(_values(by)), 2, sign=True, of=len(arm.seeds)) for by in arm.terms.values()]
            rows.append([arm.title, *cells, _delta(comparison, arm)])
    return table(["arm", *comparison.tasks, "Δm"], rows)


def differences_table(comparison: Comparison) -> str:
    """Arm minus baseline for every task in the metric's unit, over the seeds that both have."""
    tasks = comparison.folder.tasks
    rows = []
    for arm in comparison.arms.values():
        if arm.name == comparison.baseline:
            continue
        row = [arm.title]
        for task in tasks:
            test = comparison.task_differences[task][arm.name]
            text = interval(test.difference, _task_decimals(comparison, task), sign=True)
            row.append(bold(f"{text} ({test.difference.n})" if test.difference.n else DASH, test.is_better))
        test = comparison.differences[arm.name]
        row += [_difference(comparison, arm), _p(test.difference.p), _p(test.p)]
        rows.append(row)
    return table(["arm", *(task.heading for task in tasks.values()), "Δm, points", "p of Δm", "Holm's p"], rows)


def _p(value: float) -> str:
    return DASH if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def requirements_table(comparison: Comparison) -> str:
    """How many seeds effects of given sizes need, and how many of them are there."""
    effects = [requirement.effect for requirement in next(iter(comparison.requirements.values()), [])]
    rows = []
    for name, requirements in comparison.requirements.items():
        e = comparison.differences[name].difference
        spread = plain(e.sd, 2)
        rows.append([comparison.arms[name].title, str(e.n), spread, *map(_requirement, requirements)])
    return table(["arm", "seeds", "standard deviation", *(f"{effect:g} points" for effect in effects)], rows)


def _requirement(r: Requirement) -> str:
    if math.isnan(r.seeds):
        return DASH
    bounds = f"{integer(r.seeds)} ({integer(r.low)} to {integer(r.high)})"
    return f"{bounds}: " + ("settled" if r.is_settled else f"{integer(r.more)} more")


def conflicts_table(comparison: Comparison) -> str | None:
    """Rates of conflicts at the start and the end, and by how much their number changed; None if no run has any."""
    rows = []
    for arm in comparison.arms.values():
        start, end = arm.conflicts["start"], arm.conflicts["end"]
        if not start and not end:
            continue
        row = [arm.title, f"{len(start.keys() & end.keys())}"]
        for space in SPACES:
            for moment in (start, end):
                row.append(plain(100 * _mean([c.rate(space) for c in moment.values()]), 1))
            row.append(interval(estimate(_values(arm.change(space))), 2, sign=True))
        rows.append(row)
    columns = [f"{space}, {what}" for space in SPACES for what in ("start %", "end %", "change of the number %")]
    return table(["arm", "seeds", *columns], rows) if rows else None


def valid_counts_note(comparison: Comparison) -> str:
    """A warning if numbers of conflicts are of different numbers of pairs, which makes rates the better measure."""
    moved = [
        arm.title
        for arm in comparison.arms.values()
        for seed, start in arm.conflicts["start"].items()
        if seed in arm.conflicts["end"] and start.valid != arm.conflicts["end"][seed].valid
    ]
    if not moved:
        return ""
    return (
        f"The number of valid (token, pair)s differs between start and end for {listed(list(dict.fromkeys(moved)))}: "
        "compare the rates there, not the numbers."
    )


def lost_runs(comparison: Comparison) -> str:
    """Which runs diverged, and why, and which are missing; empty if none."""
    folder = comparison.folder
    lines = [
        f"- {folder.arms[arm].title}{f', {task}' if task else ''}, seed {seed}: {why}"
        for arm, task, seed, why in folder.diverged()
    ]
    parts = ["Diverged, and left out of every number above:\n\n" + "\n".join(lines)] if lines else []
    missing: dict[tuple[str, str | None], list[int]] = {}
    for arm, task, seed in folder.missing():
        missing.setdefault((arm, task), []).append(seed)
    lines = [
        f"- {folder.arms[arm].title}{f', {task}' if task else ''}: seed{'s' * (len(seeds) > 1)} {listed(seeds)}"
        for (arm, task), seeds in missing.items()
    ]
    if lines:
        parts.append("Missing, as runs that did not end or were not started:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def single_note(comparison: Comparison) -> str:
    arm = comparison.arms.get(SINGLE)
    if arm is None or not arm.seeds:
        return ""
    return (
        f" {arm.title} is one model per task: its parameters and seconds are those of all of them, its memory the "
        "largest."
    )
