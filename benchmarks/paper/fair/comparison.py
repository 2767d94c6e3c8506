"""Joint training against single-task runs, under every condition and from one condition to another, by seed."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dtme.comparison.statistics import Estimate, detectable, estimate, holm

from ..report.comparison import ArmResult, BySeed, Comparison, gains
from ..report.folder import SINGLE, TaskInfo, number
from ..report.provenance import differing_facts
from ..report.text import listed
from ..results import Run
from ..runner.tune import JOINT
from .conditions import DECAYED, DOUBLE, TUNED, UNTUNED, Condition


@dataclass(frozen=True)
class Effect:
    """A difference in % or in points, by seed."""

    by_seed: BySeed
    estimate: Estimate
    p: float
    """Of a task, adjusted by Holm's method for all tasks of the comparison."""

    @property
    def sign(self) -> int | None:
        """-1 or 1 where the whole 95 % interval is below or above 0, else 0; None where there is no interval."""
        if math.isnan(self.estimate.half_width):
            return None
        return int(self.estimate.low > 0) - int(self.estimate.high < 0)

    @property
    def is_none(self) -> bool:
        """Whether there is no difference at any seed: both sides are the same runs, or trained the same."""
        return self.estimate.n > 1 and not any(self.by_seed.values())

    @property
    def smallest(self) -> float:
        """The smallest difference that as many seeds find with a power of 80 % at this spread."""
        return detectable(self.estimate.sd, self.estimate.n)


@dataclass(frozen=True)
class Effects:
    """One comparison: Δm, and the terms that it is the mean of."""

    total: Effect
    tasks: dict[str, Effect]

    def with_sign(self, sign: int | None) -> list[str]:
        """The tasks whose effect has it."""
        return [task for task, effect in self.tasks.items() if effect.sign == sign]


def effects(total: BySeed, terms: Mapping[str, BySeed]) -> Effects:
    """Intervals and tests of differences that were taken by seed."""
    estimates = {task: estimate(list(by_seed.values())) for task, by_seed in terms.items()}
    adjusted = holm([e.p for e in estimates.values()])
    of_all = estimate(list(total.values()))
    return Effects(
        Effect(total, of_all, of_all.p),
        {task: Effect(terms[task], e, p) for (task, e), p in zip(estimates.items(), adjusted, strict=True)},
    )


@dataclass
class Result:
    """What was run under one condition."""

    condition: Condition
    comparison: Comparison
    lr: float
    """The default rate."""
    tuned: dict[str, dict[str, Any]]
    """Arm, or arm.task -> what the runner keeps of its tuning; empty where every run has the default rate."""
    tuning_runs: list[Run]
    transfer: dict[str, Effects] = field(init=False)
    """Arm -> against the single-task runs of the same seed and condition."""

    def __post_init__(self) -> None:
        self.transfer = {
            name: effects(*gains(arm, self.single, self.lower))
            for name, arm in self.arms.items()
            if name != SINGLE and self.single is not None
        }

    @property
    def arms(self) -> dict[str, ArmResult]:
        return self.comparison.arms

    @property
    def single(self) -> ArmResult | None:
        return self.arms.get(SINGLE)

    @property
    def lower(self) -> set[str]:
        return {name for name, task in self.comparison.folder.tasks.items() if task.lower_is_better}

    @property
    def runs(self) -> list[Run]:
        return self.comparison.folder.runs()

    def cost_ratio(self, of: Callable[[Run], float], other: "Result | None" = None) -> Estimate:
        """How many times what a joint run needs, at ``other`` if given, all single-task runs of its seed need."""
        parts = []
        for result, name in ((self, SINGLE), (other or self, JOINT)):
            folder = result.comparison.folder
            arm = folder.arms.get(name)
            seeds = {} if arm is None else folder.complete(arm)
            parts.append({seed: sum(map(of, runs)) for seed, runs in seeds.items()})
        single, joint = parts
        ratios = [single[seed] / joint[seed] for seed in single if joint.get(seed, 0) > 0]
        return estimate([ratio for ratio in ratios if math.isfinite(ratio)])


def training_seconds(run: Run) -> float:
    return number(run["seconds"].get("training"))


def cpu_seconds(run: Run) -> float:
    return number(run.get("cpu_seconds"))


@dataclass(frozen=True)
class Change:
    """What a change of the conditions does: to Δm, and to each side of it."""

    key: str
    title: str
    effects: Effects
    """Δm of joint training under the changed condition minus that under the other, by seed."""
    sides: dict[str, Effects] = field(default_factory=dict)
    """Arm -> its own metric under the changed condition over that under the other, in %."""


@dataclass(frozen=True)
class Study:
    """All conditions of one OUT."""

    path: Path
    title: str
    steps: int
    conditions: dict[str, Condition]
    results: dict[str, Result]
    """By the keys of the conditions; those that were not run are not in it."""

    @property
    def tasks(self) -> dict[str, TaskInfo]:
        return next(iter(self.results.values())).comparison.folder.tasks

    @property
    def runs(self) -> list[Run]:
        return [run for result in self.results.values() for run in result.runs]

    @cached_property
    def changes(self) -> list[Change]:
        """Every change whose runs are there."""
        pairs = (
            ("tuning", "tuned minus default rate", TUNED, UNTUNED),
            ("steps", f"{2 * self.steps} minus {self.steps} steps", DOUBLE, TUNED),
            ("decay", f"weight decay {self.conditions[DECAYED].weight_decay:g} minus less", DECAYED, TUNED),
        )
        found = [
            self._change(key, title, self.results[new], self.results[old])
            for key, title, new, old in pairs
            if new in self.results and old in self.results
        ]
        return found + self._weightings()

    def _change(self, key: str, title: str, new: Result, old: Result) -> Change:
        sides = {
            name: effects(*gains(new.arms[name], old.arms[name], new.lower))
            for name in (SINGLE, JOINT)
            if name in new.arms and name in old.arms
        }
        return Change(key, title, _difference(new.transfer.get(JOINT), old.transfer.get(JOINT)), sides)

    def _weightings(self) -> list[Change]:
        result = self.results.get(TUNED)
        if result is None or JOINT not in result.transfer:
            return []
        joint = result.transfer[JOINT]
        return [
            Change(name, f"{result.arms[name].title} minus equal weights", _difference(found, joint))
            for name, found in result.transfer.items()
            if name != JOINT
        ]

    @cached_property
    def mixed(self) -> dict[str, tuple[str, Effects]]:
        """Joint training under one condition against single-task runs under another: key -> (title, effects)."""
        pairs = {
            "untuned joint": (UNTUNED, "joint at the default rate, single-task runs tuned"),
            "longer joint": (DOUBLE, f"joint with {2 * self.steps} steps, single-task runs with {self.steps}"),
        }
        base = self.results.get(TUNED)
        if base is None or base.single is None:
            return {}
        return {
            key: (title, effects(*gains(self.results[other].arms[JOINT], base.single, base.lower)))
            for key, (other, title) in pairs.items()
            if other in self.results and JOINT in self.results[other].arms
        }

    @cached_property
    def notes(self) -> list[str]:
        """What a reader has to know before the numbers."""
        lacking = [c.folder for key, c in self.conditions.items() if key not in self.results]
        notes = [f"Nothing was run under {listed(lacking)}: what needs it is left out."] if lacking else []
        for result in self.results.values():
            folder, where = result.comparison.folder, result.condition.folder
            not_there = [arm for arm in result.condition.arms if arm not in folder.arms]
            if not_there:
                notes.append(f"{where} has no runs of {listed(not_there)}.")
            for count, one, more in (
                (len(folder.missing()), "is missing", "are missing"),
                (len(folder.diverged()), "diverged", "diverged"),
            ):
                if count:
                    notes.append(f"In {where}, {count} run{f's {more}' if count > 1 else f' {one}'}: see below.")
            notes += [f"{where}: {note}" for note in result.comparison.notes]
        return notes + differing_facts(self.runs)

    def losing(self) -> dict[str, list[str]]:
        """Task -> where joint training loses on it, as titles; every comparison is of like with like."""
        return {
            task: [
                f"{result.arms[arm].title}, {result.condition.title}"
                for result in self.results.values()
                for arm, found in result.transfer.items()
                if found.tasks[task].sign == -1
            ]
            for task in self.tasks
        }


def _difference(new: Effects | None, old: Effects | None) -> Effects:
    """By seed, of the seeds that both have."""
    if new is None or old is None:
        return effects({}, {})

    def between(a: Effect, b: Effect) -> BySeed:
        return {seed: value - b.by_seed[seed] for seed, value in a.by_seed.items() if seed in b.by_seed}

    return effects(
        between(new.total, old.total), {task: between(effect, old.tasks[task]) for task, effect in new.tasks.items()}
    )


def tell_apart(titles: Iterable[str], names: Iterable[str]) -> list[str]:
    """Titles of several OUT, those that are the same with the names of their folders.

    Raises:
        ValueError: two have the same title and name.
    """
    titles, names = list(titles), list(names)
    told = [f"{t} ({n})" if titles.count(t) > 1 else t for t, n in zip(titles, names, strict=True)]
    if twice := [title for title in told if told.count(title) > 1]:
        raise ValueError(f"two OUT are both {twice[0]}: give them folders with different names")
    return told
