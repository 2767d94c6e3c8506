"""Folders of runs as settings: every arm's gain over joint training of the same seed, and the random plans as one."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..fair.comparison import cpu_seconds, tell_apart
from ..report.comparison import ArmResult, BySeed, Comparison, Cost, Test, compare, gains, known, paired_tests
from ..report.folder import Folder, number, read_folder, refuse_twice
from ..report.text import setting as said
from ..results import Run, read_experiment, read_runs
from ..runner.tune import JOINT

METHOD, RANDOM = "tm+te", "random plans"
"""The method by conflict; the mean over the arms with random plans, which is no arm of the runner."""
ONE_BLOCK = re.compile(r"(tm|te)-at-(\d+)")
_RANDOM_ARM = re.compile(r"random(-\d+)?")


@dataclass(frozen=True)
class Setting:
    """One folder of runs."""

    path: Path
    title: str
    comparison: Comparison
    arms: dict[str, ArmResult]
    """All arms that have runs, and ``RANDOM``; Δm and its terms are over joint training of the same seed."""
    lr: float
    """The default rate."""
    tuned: dict[str, dict[str, Any]]
    """Arm -> what the runner keeps of its tuning; empty where no rate was tuned."""
    tuning_runs: list[Run]

    @property
    def folder(self) -> Folder:
        return self.comparison.folder

    @property
    def settings(self) -> dict[str, Any]:
        return self.folder.settings

    @property
    def joint(self) -> ArmResult:
        return self.arms[JOINT]

    @cached_property
    def random(self) -> list[ArmResult]:
        """The arms with random plans."""
        return [arm for name, arm in self.arms.items() if _RANDOM_ARM.fullmatch(name)]

    @cached_property
    def shown(self) -> list[ArmResult]:
        """What has a row in the tables of arms: not each random plan, nor each single block."""
        hidden = {arm.name for arm in self.random}
        return [arm for name, arm in self.arms.items() if name not in hidden and not ONE_BLOCK.fullmatch(name)]

    @cached_property
    def compute(self) -> dict[str, BySeed]:
        """Arm -> seed -> passes of the shared blocks in a step of the arm's own training; 1 is joint training.

        Longer joint training has as many as its additional steps stand for. Empty where the runs do not say.
        """
        return self._of_runs(_passes)

    @cached_property
    def cpu_ratio(self) -> dict[str, BySeed]:
        """Arm -> seed -> its CPU seconds over those of joint training of the seed, evaluation included."""
        seconds = self._of_runs(cpu_seconds)
        base = seconds[JOINT]
        return {
            arm: {seed: value / base[seed] for seed, value in by_seed.items() if base.get(seed, 0) > 0}
            for arm, by_seed in seconds.items()
        }

    def _of_runs(self, of: Callable[[Run], float]) -> dict[str, BySeed]:
        """Arm -> seed -> the sum over its runs, where it is known; of ``RANDOM`` the mean over the plans."""
        found = {
            name: known({seed: sum(map(of, runs)) for seed, runs in self.folder.complete(arm).items()})
            for name, arm in self.folder.arms.items()
        }
        if self.random:
            found[RANDOM] = mean_by_seed(found[arm.name] for arm in self.random)
        return found

    @cached_property
    def against_joint(self) -> dict[str, Test]:
        """Arm of ``shown`` -> Δm over joint training, tested; Holm's correction is over them."""
        return paired_tests(self.shown, self.joint, lambda arm: arm.delta_m)

    @cached_property
    def against_random(self) -> dict[str, Test]:
        """Likewise, over the mean of the random plans; empty where there are none."""
        if RANDOM not in self.arms:
            return {}
        others = [arm for arm in self.shown if arm.name != JOINT]
        return paired_tests(others, self.arms[RANDOM], lambda arm: arm.delta_m)


def read_settings(outs: Sequence[Path]) -> list[Setting]:
    """Several folders of runs, each with a title of its own.

    Raises:
        ValueError: a folder is named twice, cannot be told from another, has no joint training, or holds a file that is
            not as the runner writes it; the message names it.
    """
    refuse_twice(outs)
    settings = [_read(out) for out in outs]
    return [replace(one, title=title) for one, title in zip(settings, _apart(settings), strict=True)]


def _apart(settings: Sequence[Setting]) -> list[str]:
    """Titles that differ: by the experiment where that is enough, else by the folder, else with the one it is in."""
    titles, paths = [one.title for one in settings], [one.path.resolve() for one in settings]
    experiments = [one.folder.experiment for one in settings]
    for names in (experiments, [path.name for path in paths]):
        try:
            return tell_apart(titles, names)
        except ValueError:
            continue
    return tell_apart(titles, [f"{path.parent.name}/{path.name}" for path in paths])


def _read(out: Path) -> Setting:
    folder, experiment = read_folder(out), read_experiment(out)
    if JOINT not in folder.arms:
        raise ValueError(f"{out / 'experiment.json'} has no arm {JOINT!r}, which every arm is compared with")
    comparison = compare(folder, JOINT)
    lower = {name for name, task in folder.tasks.items() if task.lower_is_better}
    arms = {}
    for name, arm in comparison.arms.items():
        totals, terms = gains(arm, comparison.arms[JOINT], lower)
        arms[name] = replace(arm, delta_m=totals, terms=terms)
    tuned = experiment.get("tuned") or {}
    for name, facts in tuned.items():
        if not isinstance(facts, dict) or not isinstance(facts.get("tried"), dict):
            raise ValueError(f"{out / 'experiment.json'}: tuned has no tried rates for {name!r}, got {facts!r}")
    tuning = list(read_runs(out / "tuning")) if tuned else []
    setting = Setting(out, _title(folder), comparison, arms, number(experiment.get("lr")), tuned, tuning)
    if setting.random:
        arms[RANDOM] = pooled(setting.random)
    return setting


def _passes(run: Run) -> float:
    if run["arm"] == JOINT:
        return 1.0
    structure = run.get("structure") or {}
    return number(structure.get("compute", structure.get("passes")))


def _title(folder: Folder) -> str:
    backbone = said(folder.settings.get("backbone", "backbone not known"))
    return f"{folder.data}, {backbone}, {len(folder.tasks)} tasks"


def pooled(arms: Sequence[ArmResult]) -> ArmResult:
    """The mean over ``arms`` by seed, of those that have the number at the seed.

    A seed is its if any of them has it; at the seeds at which one diverged, so did it.
    """
    tasks = arms[0].metrics
    count = f"{len(arms)} plan{'s' * (len(arms) > 1)}"
    return ArmResult(
        RANDOM,
        f"random plans, mean of {count}",
        tuple(sorted({seed for arm in arms for seed in arm.seeds})),
        tuple(sorted({seed for arm in arms for seed in arm.diverged})),
        {task: mean_by_seed(arm.metrics[task] for arm in arms) for task in tasks},
        _mean_costs(arms),
        {"start": {}, "end": {}},
        {task: {} for task in tasks},
        {task: mean_by_seed(arm.terms[task] for arm in arms) for task in tasks},
        mean_by_seed(arm.delta_m for arm in arms),
    )


def _mean_costs(arms: Sequence[ArmResult]) -> dict[int, Cost]:
    fields = tuple(Cost.__dataclass_fields__)
    by_field = {
        field: mean_by_seed({s: getattr(cost, field) for s, cost in arm.costs.items()} for arm in arms)
        for field in fields
    }
    return {seed: Cost(*(by_field[field][seed] for field in fields)) for seed in by_field[fields[0]]}


def mean_by_seed(of: Iterable[Mapping[int, float]]) -> BySeed:
    """The mean over several, at every seed that one of them has."""
    several = list(of)
    seeds = sorted({seed for one in several for seed in one})
    return {seed: float(np.mean([one[seed] for one in several if seed in one])) for seed in seeds}
