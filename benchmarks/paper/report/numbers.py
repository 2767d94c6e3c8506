"""``report.json``: the numbers of a report for machines. Whatever is not known is null."""

import json
import math
from dataclasses import asdict
from functools import partial
from typing import Any

from dtme.comparison.statistics import LEVEL, POWER, Estimate, Requirement, estimate

from .beside import entries
from .comparison import SPACES, ArmResult, Comparison, Test
from .provenance import differing_facts, times

FORMAT = 1
DIGITS = 10
"""Significant digits of a number: beyond, the order of a sum shows."""


def numbers(comparison: Comparison) -> dict[str, Any]:
    """All numbers of the report, of JSON's types only."""
    folder = comparison.folder
    return clean(
        {
            "format": FORMAT,
            "experiment": folder.experiment,
            "data": folder.data,
            "tasks": {name: asdict(task) for name, task in folder.tasks.items()},
            "seeds": list(folder.seeds),
            "baseline": comparison.baseline,
            "reference": comparison.reference,
            "level": LEVEL,
            "power": POWER,
            "arms": {name: _arm(comparison, arm) for name, arm in comparison.arms.items()},
            "diverged": [dict(zip(("arm", "task", "seed", "reason"), row, strict=True)) for row in folder.diverged()],
            "missing": [dict(zip(("arm", "task", "seed"), row, strict=True)) for row in folder.missing()],
            "notes": [*differing_facts(folder.runs()), *comparison.notes],
            "time": times(folder.runs()),
            "paper": [
                {key: getattr(e, key) for key in ("backbone", "arm", "tables", "metrics", "delta_m", "recomputed")}
                for e in entries(folder.data)
            ],
        }
    )


def _arm(comparison: Comparison, arm: ArmResult) -> dict[str, Any]:
    test = comparison.differences.get(arm.name)
    return {
        "title": arm.title,
        "seeds": list(arm.seeds),
        "diverged": list(arm.diverged),
        "metrics": {task: _by_seed(by_seed) for task, by_seed in arm.metrics.items()},
        "terms": {task: _by_seed(by_seed) for task, by_seed in arm.terms.items()},
        "delta_m": _by_seed(arm.delta_m),
        "difference": None if test is None else _test(test),
        "task_differences": {
            task: _test(tests[arm.name]) for task, tests in comparison.task_differences.items() if arm.name in tests
        },
        "seeds_needed": [_requirement(r) for r in comparison.requirements.get(arm.name, ())],
        "cost": {
            key: _estimate(estimate([v for cost in arm.costs.values() if not math.isnan(v := getattr(cost, key))]))
            for key in ("added", "base", "training", "structure", "memory")
        },
        "conflicts": {
            space: {
                **{
                    moment: {seed: at.rate(space) for seed, at in by_seed.items()}
                    for moment, by_seed in arm.conflicts.items()
                },
                "change": _by_seed(arm.change(space)),
            }
            for space in SPACES
        },
    }


def _estimate(e: Estimate) -> dict[str, Any]:
    return {"n": e.n, "mean": e.mean, "sd": e.sd, "half_width": e.half_width}


def _by_seed(by_seed: dict[int, float]) -> dict[str, Any]:
    return {**_estimate(estimate(list(by_seed.values()))), "by_seed": by_seed}


def _test(test: Test) -> dict[str, Any]:
    p = {"p": test.difference.p, "p_holm": test.p, "is_better": test.is_better}
    return {**_by_seed(test.by_seed), **p}


def _requirement(r: Requirement) -> dict[str, Any]:
    return {**asdict(r), "more": r.more, "is_settled": r.is_settled}


def clean(value: Any, digits: int = DIGITS) -> Any:
    """The same with null for numbers that JSON does not have, and text for keys."""
    if isinstance(value, dict):
        return {str(key): clean(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def as_text(content: dict[str, Any]) -> str:
    """JSON with a line per key, and per arm, so that two reports can be compared line by line."""
    dump = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    lines = []
    for key, value in content.items():
        text = dump(value)
        if key == "arms":
            text = "{\n" + ",\n".join(f"  {dump(name)}: {dump(arm)}" for name, arm in value.items()) + "\n }"
        lines.append(f" {dump(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
