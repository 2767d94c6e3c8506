"""The conditions of an OUT that ``fair`` filled, checked against each other."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..report.comparison import compare
from ..report.folder import read_folder, refuse_twice
from ..results import read_experiment, read_runs
from ..runner.config import differences
from ..runner.tune import JOINT, label
from .comparison import Result, Study, tell_apart
from .conditions import DECAYED, TUNED, UNTUNED, Condition, conditions


def read_studies(outs: Sequence[Path]) -> list[Study]:
    """Several OUT, each with a title of its own.

    Raises:
        ValueError: as ``read_study``, or two cannot be told apart.
    """
    refuse_twice(outs)
    studies = [read_study(out) for out in outs]
    titles = tell_apart([study.title for study in studies], [study.path.resolve().name for study in studies])
    return [replace(study, title=title) for study, title in zip(studies, titles, strict=True)]


def read_study(out: Path) -> Study:
    """All conditions under which runs ended.

    Raises:
        ValueError: there are none; or a file is not as the runner writes it; or the settings of a folder are not those
            of its condition, or differ from those of another beyond what the conditions are about.
    """
    folders = [path.parent for path in sorted(out.glob("*/experiment.json")) if any(path.parent.glob("runs/*.json"))]
    experiments = {folder.name: read_experiment(folder) for folder in folders}
    plan = conditions(_steps(out, experiments))
    results = {
        key: _result(out / condition.folder, condition, experiments[condition.folder])
        for key, condition in plan.items()
        if condition.folder in experiments
    }
    if unknown := sorted(experiments.keys() - {condition.folder for condition in plan.values()}):
        known = ", ".join(condition.folder for condition in plan.values())
        raise ValueError(f"{out / unknown[0]} is of none of the conditions {known}: move it elsewhere")
    _check(out, results, experiments)
    folder = next(iter(results.values())).comparison.folder
    title = f"{folder.data}, {Path(folder.settings['backbone']).name}"  # of a folder, not where it lies
    return Study(out, title, plan[TUNED].steps, plan, results)


def _steps(out: Path, experiments: dict[str, Any]) -> int:
    """The single number of steps: that of the conditions that are not named after it, else the smallest."""
    for key in (UNTUNED, DECAYED):
        if key in experiments:
            return int(experiments[key]["settings"]["steps"])
    named = [name.partition("-")[2] for name in experiments if name.startswith("steps-")]
    if not named or not all(number.isdecimal() for number in named):
        raise ValueError(f"{out} holds no runs of any condition: run `python -m benchmarks.paper fair --out {out}`")
    return min(map(int, named))


def _result(path: Path, condition: Condition, experiment: dict[str, Any]) -> Result:
    folder = read_folder(path)
    baseline = JOINT if JOINT in folder.arms else next(iter(folder.arms))
    tuned = experiment.get("tuned", {})
    for name, facts in tuned.items():
        if not isinstance(facts, dict) or not isinstance(facts.get("lr"), float):
            raise ValueError(f"{path / 'experiment.json'}: tuned has no lr for {name!r}, got {facts!r}")
    tuning_runs = list(read_runs(path / "tuning")) if condition.is_tuned else []
    return Result(condition, compare(folder, baseline), experiment["lr"], tuned, tuning_runs)


def _check(out: Path, results: dict[str, Result], experiments: dict[str, Any]) -> None:
    """Raises: ValueError: folders that are to be compared differ in more than their conditions."""
    first = next(iter(results.values())).condition.folder
    common = _settings(experiments[first])
    for result in results.values():
        condition, where = result.condition, out / result.condition.folder
        settings = _settings(experiments[condition.folder])
        own = {"steps": condition.steps}
        if condition.weight_decay is not None:
            own["weight_decay"] = condition.weight_decay
        if other := differences(settings, own):
            raise ValueError(f"{where} was not run under its condition: {other}")
        if other := differences(common, {name: value for name, value in settings.items() if name not in own}):
            raise ValueError(f"{where} differs from {out / first} in more than its condition: {other}")
        if condition.weight_decay == common["weight_decay"] and condition.folder != first:
            raise ValueError(f"{where} and {out / first} have the same weight decay, {common['weight_decay']:g}")
        _check_rates(where, result, results.get(condition.rates_of or ""))


def _settings(experiment: dict[str, Any]) -> dict[str, Any]:
    return experiment["settings"] | {"lr": experiment["lr"], "tasks": experiment["tasks"]}


def _check_rates(where: Path, result: Result, source: Result | None) -> None:
    condition, tuned = result.condition, result.tuned
    trained = sorted({label(run["arm"], run["task"]) for run in result.runs})
    if not condition.is_tuned and condition.rates_of is None:
        if tuned:
            raise ValueError(f"{where} was not run under its condition: the rate of {next(iter(tuned))} is tuned")
        return
    if lacking := [name for name in trained if name not in tuned]:
        raise ValueError(f"{where} was not run under its condition: the rate of {lacking[0]} is not tuned")
    for name in trained:
        if source is not None and name in source.tuned and source.tuned[name]["lr"] != tuned[name]["lr"]:
            raise ValueError(
                f"{where} was run with another rate of {name} ({tuned[name]['lr']:g}) than the condition "
                f"{source.condition.folder} has ({source.tuned[name]['lr']:g})"
            )
