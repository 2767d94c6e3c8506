"""``fair.json``: the numbers of the report for machines. Whatever is not known is null."""

import json
import math
from typing import Any

from dtme.comparison.statistics import LEVEL, POWER, Estimate

from ..report.numbers import clean
from ..report.provenance import times
from .answer import answer
from .comparison import Effect, Effects, Result, Study, cpu_seconds, training_seconds

FORMAT = 1
DIGITS = 6
"""Significant digits."""
DEPTH = 6
"""Of what has a line of its own: studies, a study, its conditions, a condition, its arms."""


def as_text(value: Any, depth: int = DEPTH) -> str:
    """JSON with a line per entry down to ``depth``, so that two reports can be compared line by line."""
    if not depth or not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    space = " " * (DEPTH + 1 - depth)
    lines = [f"{space}{json.dumps(key, ensure_ascii=False)}: {as_text(item, depth - 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{space[1:]}}}"


def numbers(studies: list[Study]) -> dict[str, Any]:
    content = {
        "format": FORMAT,
        "level": LEVEL,
        "power": POWER,
        "studies": {study.title: _study(study) for study in studies},
    }
    return clean(content, DIGITS)  # type: ignore[no-any-return]


def _study(study: Study) -> dict[str, Any]:
    folder = next(iter(study.results.values())).comparison.folder
    return {
        "data": folder.data,
        "tasks": {
            name: {"metric": task.metric, "unit": task.unit, "lower_is_better": task.lower_is_better}
            for name, task in study.tasks.items()
        },
        "steps": study.steps,
        "answer": answer(study),
        "notes": study.notes,
        "conditions": {key: _condition(result) for key, result in study.results.items()},
        "changes": {
            change.key: {
                "title": change.title,
                **_effects(change.effects),
                "sides": {arm: _effects(found) for arm, found in change.sides.items()},
            }
            for change in study.changes
        },
        "mixed": {key: {"title": title, **_effects(found)} for key, (title, found) in study.mixed.items()},
    }


def _condition(result: Result) -> dict[str, Any]:
    folder = result.comparison.folder
    return {
        "folder": result.condition.folder,
        "title": result.condition.title,
        "steps": result.condition.steps,
        "weight_decay": folder.settings["weight_decay"],
        "seeds": list(folder.seeds),
        "lr": result.lr,
        "tuned": result.tuned,
        "transfer": {arm: _effects(found) for arm, found in result.transfer.items()},
        "metrics": {arm: found.metrics for arm, found in result.arms.items()},
        "time": times(result.runs),
        "tuning_time": times(result.tuning_runs) if result.condition.is_tuned else None,
        "single_over_joint": {
            "training": _estimate(result.cost_ratio(training_seconds)),
            "cpu": _estimate(result.cost_ratio(cpu_seconds)),
        },
        "missing": [list(run) for run in folder.missing()],
        "diverged": [list(run) for run in folder.diverged()],
    }


def _effects(found: Effects) -> dict[str, Any]:
    return {
        "delta_m": _effect(found.total),
        "tasks": {task: _effect(effect, is_adjusted=True) for task, effect in found.tasks.items()},
    }


def _effect(effect: Effect, is_adjusted: bool = False) -> dict[str, Any]:
    adjusted = {"p_holm": effect.p} if is_adjusted else {}
    return {
        **_estimate(effect.estimate),
        "p": effect.estimate.p,
        **adjusted,
        "sign": effect.sign,
        "smallest": effect.smallest,
        "by_seed": effect.by_seed,
    }


def _estimate(e: Estimate) -> dict[str, Any]:
    return {"n": e.n, "mean": math.nan if not e.n else e.mean, "sd": e.sd, "half_width": e.half_width}
