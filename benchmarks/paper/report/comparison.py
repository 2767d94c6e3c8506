"""Every arm of a folder against the baseline, by seed: the numbers that tables, figures and ``report.json`` show."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dtme.comparison.delta import delta_m
from dtme.comparison.statistics import ALPHA, Estimate, Requirement, estimate, holm, requirement

from ..results import Run
from .folder import SINGLE, ArmRuns, Folder, number

BASELINE = "joint"
EFFECTS = (0.5, 1.0, 3.0)
"""Points of Δm."""
SPACES = ("range", "null")
BySeed = dict[int, float]
"""Seed -> number; a seed whose number is not known is not in it."""


@dataclass(frozen=True)
class Cost:
    """What an arm costs at one seed; NaN where a run does not say. Of an arm that trains every task alone: all its
    runs together, and the largest memory of any."""

    added: float
    """Parameters beyond one backbone and the heads."""
    base: float
    """Parameters of the backbone and all heads."""
    training: float
    """Seconds."""
    structure: float
    """Seconds."""
    memory: float
    """Bytes, at the peak."""


@dataclass(frozen=True)
class Conflicts:
    """Conflicts of one run at one moment."""

    counts: Mapping[str, float]
    """Space -> (token, pair)s in conflict."""
    valid: float
    """(token, pair)s that could be."""
    blocks: tuple[str, ...]
    rates: Mapping[str, list[float]]
    """Space -> rate of every block."""

    def rate(self, space: str) -> float:
        return self.counts[space] / self.valid if self.valid else math.nan


@dataclass
class ArmResult:
    """One arm's numbers by seed, over the seeds at which all its runs ended without diverging."""

    name: str
    title: str
    seeds: tuple[int, ...]
    diverged: tuple[int, ...]
    """Seeds at which a run of it diverged."""
    metrics: dict[str, BySeed]
    """Task -> metric."""
    costs: dict[int, Cost]
    conflicts: dict[str, dict[int, Conflicts]]
    """"start" and "end"."""
    losses: dict[str, dict[int, list[float]]]
    """Task -> seed -> losses over training."""
    terms: dict[str, BySeed] = field(default_factory=dict)
    """Task -> its term of Δm in %."""
    delta_m: BySeed = field(default_factory=dict)
    """In %; only where every task has its term."""

    def change(self, space: str) -> BySeed:
        """Relative change of the number of conflicts from start to end in %."""
        start, end = self.conflicts["start"], self.conflicts["end"]
        return {
            seed: 100 * (end[seed].counts[space] / start[seed].counts[space] - 1)
            for seed in start
            if seed in end and start[seed].counts[space] > 0 and not math.isnan(end[seed].counts[space])
        }


@dataclass(frozen=True)
class Test:
    """A paired comparison with the baseline."""

    difference: Estimate
    """Arm minus baseline, over the seeds that both have."""
    by_seed: BySeed
    p: float
    """Adjusted by Holm's method for all the arms in the column."""
    is_better: bool
    """p < 5 %, in the direction that is better, and the arm diverged at no seed."""


@dataclass(frozen=True)
class Comparison:
    """All arms of a folder."""

    folder: Folder
    baseline: str
    reference: str
    """The arm that Δm is relative to."""
    arms: dict[str, ArmResult]
    differences: dict[str, Test]
    """Arm -> of Δm in points."""
    task_differences: dict[str, dict[str, Test]]
    """Task -> arm -> of the metric, in its unit."""
    requirements: dict[str, list[Requirement]]
    """Arm -> one per effect of ``EFFECTS``."""
    notes: list[str]
    """What a reader has to know before the numbers, worst first."""

    @property
    def tasks(self) -> list[str]:
        return list(self.folder.tasks)


def compare(folder: Folder, baseline: str = BASELINE) -> Comparison:
    """Compare all arms with ``baseline``, seed by seed.

    Δm is relative to the single-task runs of the same seed where the folder has them for all tasks at any seed, else to
    joint training, else to the baseline.

    Raises:
        ValueError: ``baseline`` is no arm of the experiment.
    """
    if baseline not in folder.arms:
        raise ValueError(f"--baseline {baseline}: {folder.path} has no such arm, only {', '.join(folder.arms)}")
    arms = {name: _result(folder, arm) for name, arm in folder.arms.items()}
    notes = []
    reference = next(
        (name for name in (SINGLE, BASELINE) if name in arms and (name != SINGLE or arms[name].seeds)), baseline
    )
    if SINGLE in arms and reference != SINGLE:
        notes.append(f"No seed has the single-task runs of all tasks yet, so that Δm is relative to {reference}.")
    lower = {name for name, task in folder.tasks.items() if task.lower_is_better}
    for arm in arms.values():
        arm.delta_m, arm.terms = gains(arm, arms[reference], lower)
    notes += _undefined(arms.values(), arms[reference])
    base = arms[baseline]
    differences = paired_tests(arms.values(), base, lambda arm: arm.delta_m)
    return Comparison(
        folder,
        baseline,
        reference,
        arms,
        differences,
        {task: _task_tests(arms.values(), base, task, task in lower) for task in folder.tasks},
        {name: [requirement(test.difference, effect) for effect in EFFECTS] for name, test in differences.items()},
        notes,
    )


# --- one arm ----------------------------------------------------------------------------------------------------------


def _result(folder: Folder, arm: ArmRuns) -> ArmResult:
    complete = folder.complete(arm)
    moments: dict[str, dict[int, Conflicts]] = {"start": {}, "end": {}}
    for seed, runs in complete.items():
        for moment, by_seed in moments.items():
            facts = (runs[0].get("conflicts") or {}).get(moment)
            if facts and not arm.is_single:
                by_seed[seed] = _conflicts(facts)
    return ArmResult(
        arm.name,
        arm.title,
        tuple(complete),
        tuple(seed for seed in sorted(arm.runs) if any(r["status"] == "diverged" for r in arm.runs[seed].values())),
        {task: known({s: _value(runs, "metrics", task) for s, runs in complete.items()}) for task in folder.tasks},
        {seed: _cost(runs) for seed, runs in complete.items()},
        moments,
        {
            task: {
                s: [number(v) for v in run["losses"][task]]
                for s, runs in complete.items()
                for run in runs
                if run["losses"].get(task)
            }
            for task in folder.tasks
        },
    )


def _value(runs: list[Run], key: str, task: str) -> float:
    return next((number(run[key][task]) for run in runs if task in run[key]), math.nan)


def known(values: BySeed) -> BySeed:
    """Without those that are NaN."""
    return {seed: value for seed, value in values.items() if not math.isnan(value)}


def _conflicts(facts: dict) -> Conflicts:
    return Conflicts(
        {space: number(facts.get(f"{space}_counts")) for space in SPACES},
        number(facts.get("valid_counts")),
        tuple(map(str, facts.get("blocks", ()))),
        {space: [number(rate) for rate in facts.get(space, ())] for space in SPACES},
    )


def _cost(runs: list[Run]) -> Cost:
    def of(run: Run, group: str, key: str) -> float:
        return number((run.get(group) or {}).get(key))

    backbone = of(runs[0], "parameters", "backbone")
    return Cost(
        sum(of(run, "parameters", "backbone") + of(run, "parameters", "added") for run in runs) - backbone,
        backbone + sum(of(run, "parameters", "heads") for run in runs),
        sum(of(run, "seconds", "training") for run in runs),
        sum(of(run, "seconds", "structure") for run in runs),
        float(np.max([number(run.get("peak_memory")) for run in runs])),  # NaN if one is not known
    )


def gains(arm: ArmResult, reference: ArmResult, lower: Collection[str]) -> tuple[BySeed, dict[str, BySeed]]:
    """Δm of an arm over another, or over itself in another folder, by seed, and its terms by task, in %.

    Both are there at the seeds, and terms for the tasks, where they are defined; Δm where every task has its term.

    Args:
        lower: tasks whose metric is better if lower.
    """
    totals: BySeed = {}
    terms: dict[str, BySeed] = {task: {} for task in arm.metrics}
    for seed in arm.seeds:
        bases = {task: by_seed.get(seed, 0) for task, by_seed in reference.metrics.items()}
        known = [task for task, by_seed in arm.metrics.items() if seed in by_seed and bases[task] != 0]
        if not known:
            continue
        results = {task: arm.metrics[task][seed] for task in known}
        total, of_tasks = delta_m(results, {task: bases[task] for task in known}, set(lower) & set(known))
        for task, term in of_tasks.items():
            terms[task][seed] = term
        if len(known) == len(arm.metrics):
            totals[seed] = total
    return totals, terms


def _undefined(arms: Iterable[ArmResult], reference: ArmResult) -> list[str]:
    """Where Δm is not defined although the arm's runs are there, and why."""
    arms = list(arms)
    seeds = sorted({seed for arm in arms for seed in arm.seeds})
    notes = [
        f"No arm has a Δm at seed {seed}: {reference.title}, which Δm is relative to, has no complete run of that seed."
        for seed in seeds
        if seed not in reference.seeds
    ]
    for arm in [reference, *(arm for arm in arms if arm is not reference)]:
        lacking = "No arm has a Δm" if arm is reference else f"{arm.title} has no Δm"
        for task, by_seed in arm.metrics.items():
            null = [seed for seed in arm.seeds if seed not in by_seed]
            zero = [seed for seed in arm.seeds if by_seed.get(seed) == 0 and arm is reference]
            for lost, why in ((null, "is not defined"), (zero, "is 0, which nothing can be relative to")):
                if lost:
                    at = f"seed{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}"
                    notes.append(f"{lacking} at {at}: the metric of {task} of {arm.title} {why}.")
    return notes


# --- against the baseline ---------------------------------------------------------------------------------------------


def _task_tests(arms: Iterable[ArmResult], baseline: ArmResult, task: str, lower_is_better: bool) -> dict[str, Test]:
    return paired_tests(arms, baseline, lambda arm: arm.metrics[task], lower_is_better)


def paired_tests(
    arms: Iterable[ArmResult], baseline: ArmResult, of: Callable[[ArmResult], BySeed], lower_is_better: bool = False
) -> dict[str, Test]:
    """Arm -> its paired comparison, for all arms but the baseline; the p-values are adjusted over all of these.

    Args:
        of: the numbers of an arm that are compared.
    """
    others = [arm for arm in arms if arm is not baseline]
    base = of(baseline)
    pairs = [{seed: value - base[seed] for seed, value in of(arm).items() if seed in base} for arm in others]
    estimates = [estimate(list(by_seed.values())) for by_seed in pairs]
    adjusted = holm([e.p for e in estimates])
    return {
        arm.name: Test(e, by_seed, p, p < ALPHA and (e.mean < 0) == lower_is_better and not arm.diverged)
        for arm, e, by_seed, p in zip(others, estimates, pairs, adjusted, strict=True)
    }
