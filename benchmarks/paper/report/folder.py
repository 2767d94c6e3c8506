"""What a folder of runs holds, by arm and seed, checked against what its experiment says it should hold."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dtme.files import write_beside

from ..results import Run, read_experiment, read_runs, run_name, run_path

SINGLE = "single"
"""The arm that trains every task alone, one run per task."""
EXPERIMENT_KEYS = {"experiment": str, "arms": dict, "seeds": list, "settings": dict, "data": str, "tasks": dict}
RUN_KEYS = {"status": str, "settings": dict, "facts": dict, "metrics": dict, "losses": dict, "seconds": dict}
STATUSES = ("done", "diverged")


@dataclass(frozen=True)
class TaskInfo:
    """What the experiment says of a task."""

    name: str
    metric: str
    unit: str
    lower_is_better: bool

    @property
    def heading(self) -> str:
        return f"{self.name} {self.metric} {self.unit}".strip() + (" ↓" if self.lower_is_better else " ↑")


@dataclass
class ArmRuns:
    """All runs of one arm: one per seed, or one per seed and task where every task is trained alone."""

    name: str
    title: str
    is_single: bool = False
    runs: dict[int, dict[str | None, Run]] = field(default_factory=dict)
    """Seed -> task, or None for all tasks at once -> run."""

    def parts(self, tasks: Iterable[str]) -> list[str | None]:
        """What has to be run at every seed."""
        return list(tasks) if self.is_single else [None]

    def all(self) -> list[Run]:
        return [run for seed in sorted(self.runs) for run in self.runs[seed].values()]


@dataclass(frozen=True)
class Folder:
    """The runs of an experiment."""

    path: Path
    experiment: str
    data: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    tasks: dict[str, TaskInfo]
    arms: dict[str, ArmRuns]

    def runs(self) -> list[Run]:
        return [run for arm in self.arms.values() for run in arm.all()]

    def missing(self) -> list[tuple[str, str | None, int]]:
        """(arm, task or None, seed) of every run that the experiment has and the folder has not."""
        return [
            (arm.name, part, seed)
            for arm in self.arms.values()
            for part in arm.parts(self.tasks)
            for seed in self.seeds
            if part not in arm.runs.get(seed, {})
        ]

    def diverged(self) -> list[tuple[str, str | None, int, str]]:
        """(arm, task or None, seed, why) of every run that diverged."""
        return [
            (run["arm"], run["task"], run["seed"], str(run.get("reason") or "no reason is given"))
            for run in self.runs()
            if run["status"] == "diverged"
        ]

    def complete(self, arm: ArmRuns) -> dict[int, list[Run]]:
        """Seed -> runs, for the seeds at which every run of the arm is there and none diverged."""
        parts = arm.parts(self.tasks)
        chosen = {seed: [by[part] for part in parts if part in by] for seed, by in sorted(arm.runs.items())}
        return {
            seed: runs
            for seed, runs in chosen.items()
            if len(runs) == len(parts) and all(run["status"] == "done" for run in runs)
        }


def read_folder(path: Path) -> Folder:
    """Read ``experiment.json`` and all of ``runs/``.

    Raises:
        ValueError: a file is missing, is no JSON, lacks something, or is of an arm, task or seed that the experiment
            does not have, or there are no runs; the message names it.
    """
    experiment = read_experiment(path)
    where = path / "experiment.json"
    _check_keys(where, experiment, EXPERIMENT_KEYS)
    tasks = {name: _task(where, name, facts) for name, facts in experiment["tasks"].items()}
    arms = {name: ArmRuns(name, str(title), name == SINGLE) for name, title in experiment["arms"].items()}
    if not tasks or not arms:
        raise ValueError(f"{where} has no {'arms' if tasks else 'tasks'}")
    _tell_apart(arms)
    folder = Folder(
        path,
        experiment["experiment"],
        experiment["data"],
        experiment["settings"],
        tuple(experiment["seeds"]),
        tasks,
        arms,
    )
    for run in read_runs(path):
        _add(folder, run)
    if not folder.runs():
        raise ValueError(f"{path / 'runs'} holds no run that ended: nothing to report yet")
    return folder


def _check_keys(where: Path, content: dict[str, Any], keys: Mapping[str, type]) -> None:
    for key, kind in keys.items():
        if not isinstance(content.get(key), kind):
            got = f"{key} is {content[key]!r}" if key in content else f"{key} is missing"
            raise ValueError(f"{where} is not as the runner writes it: {got}, expected a JSON {kind.__name__}")


def _task(where: Path, name: str, facts: Any) -> TaskInfo:
    try:
        return TaskInfo(name, str(facts["metric"]), str(facts["unit"]), bool(facts["lower_is_better"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: task {name!r} must have metric, unit and lower_is_better, got {facts!r}") from error


def _tell_apart(arms: dict[str, ArmRuns]) -> None:
    count = Counter(arm.title for arm in arms.values())
    for arm in arms.values():
        if count[arm.title] > 1:
            arm.title = f"{arm.title} ({arm.name})"


def _add(folder: Folder, run: Run) -> None:
    identity = [run.get(key) for key in ("arm", "task", "seed")]
    name, part, seed = identity
    if not isinstance(name, str) or not (part is None or isinstance(part, str)) or not isinstance(seed, int):
        raise ValueError(f"a run in {folder.path / 'runs'} has arm, task and seed {identity}, a name, name and integer")
    where = run_path(folder.path, run_name(name, part, seed))
    _check_keys(where, run, RUN_KEYS)
    for what, value, known in (
        ("arm", name, folder.arms),
        ("seed", seed, folder.seeds),
        ("task", part, [None, *folder.tasks]),
        ("status", run["status"], STATUSES),
    ):
        if value not in known:
            listed = ", ".join(str(k) for k in known if k is not None)
            raise ValueError(f"{where} has {what} {value!r}, expected one of {listed}")
    arm = folder.arms[name]
    if (part is not None) != arm.is_single and arm.runs:
        raise ValueError(
            f"{where}: some runs of {name!r} are of one task, some of all; remove those that do not belong"
        )
    arm.is_single = part is not None
    if part in arm.runs.setdefault(seed, {}):
        raise ValueError(f"{where} is there twice: two files in {where.parent} have this arm, task and seed")
    _check_metrics(where, run, folder.tasks if part is None else [part], folder.tasks)
    arm.runs[seed][part] = run


def _check_metrics(where: Path, run: Run, expected: Iterable[str], tasks: Iterable[str]) -> None:
    unknown = [task for key in ("metrics", "losses") for task in run[key] if task not in tasks]
    if unknown:
        raise ValueError(f"{where} has a metric or loss of task {unknown[0]!r}, expected one of {', '.join(tasks)}")
    lacking = [task for task in expected if task not in run["metrics"]]
    if lacking and run["status"] == "done":
        raise ValueError(f"{where} is done and has no metric of task {lacking[0]!r}")
    for task, value in run["metrics"].items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where} has {value!r} as the metric of task {task!r}, expected a number or null")


def number(value: Any) -> float:
    """A number of a run, NaN where it has none: null, infinite or missing."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def refuse_twice(outs: Sequence[Path]) -> None:
    """Raises: ValueError: one folder is named twice; the message names it."""
    for at, out in enumerate(outs):
        if out.resolve() in [other.resolve() for other in outs[:at]]:
            raise ValueError(f"{out} is named twice")


def write_texts(to: Path, texts: Mapping[str, str]) -> Path:
    """Write a report's files into the folder ``to``, each whole or not at all; returns the path of ``report.md``."""
    for name, text in texts.items():
        write_beside(to / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return to / "report.md"
