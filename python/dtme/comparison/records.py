"""Comparisons as JSON files."""

import math
import os
from typing import TYPE_CHECKING, Any

from ..checks import Record, at_least, list_of, mapping_of, names, number, one_of, or_null, positive, text
from ..formats import Format
from ..plan import check_plan
from .metrics import DIRECTIONS

if TYPE_CHECKING:
    from .result import Comparison

COST = Record(
    {"added": at_least(-(2**62)), "compute": or_null(positive), "steps": at_least(1), "seconds": number},
)
FIELDS = Record(
    {
        "tasks": mapping_of(one_of(*DIRECTIONS)),
        "arms": names,
        "seeds": list_of(at_least(0)),
        "metrics": mapping_of(mapping_of(list_of(or_null(number)))),
        "costs": mapping_of(list_of(COST)),
        "plans": mapping_of(list_of(or_null(check_plan))),
        "budget": at_least(1),
        "start": at_least(0),
        "margin": positive,
        "rates": mapping_of(positive),
        "tuning": mapping_of(list_of(Record({"lr": positive, "score": or_null(number)}))),
        "diverged": mapping_of(list_of(Record({"seed": at_least(0), "why": text}))),
        "notes": list_of(text),
    }
)
FORMAT = Format("dtme.Comparison", FIELDS)


def save(comparison: "Comparison", path: str | os.PathLike[str]) -> None:
    """Write it; JSON knows no NaN, for which null stands."""
    content: dict[str, Any] = {
        "tasks": dict(comparison.tasks),
        "arms": list(comparison.arms),
        "seeds": list(comparison.seeds),
        "metrics": {
            arm: {task: [_or_null(value) for value in values] for task, values in of_tasks.items()}
            for arm, of_tasks in comparison.metrics.items()
        },
        "costs": {
            arm: [{**vars(cost), "compute": _or_null(cost.compute)} for cost in costs]
            for arm, costs in comparison.costs.items()
        },
        "plans": {
            arm: [None if plan is None else plan.as_dict() for plan in plans] for arm, plans in comparison.plans.items()
        },
        "budget": comparison.budget,
        "start": comparison.start,
        "margin": comparison.margin,
        "rates": dict(comparison.rates),
        "tuning": {
            arm: [{"lr": lr, "score": score} for lr, score in scores.items()]
            for arm, scores in comparison.tuning.items()
        },
        "diverged": {
            arm: [{"seed": seed, "why": why} for seed, why in reasons.items()]
            for arm, reasons in comparison.diverged.items()
        },
        "notes": list(comparison.notes),
    }
    FORMAT.save(path, content)


def load(cls: "type[Comparison]", path: str | os.PathLike[str]) -> "Comparison":
    """Read what ``save`` wrote; ValueError names the file and what is wrong with it."""
    from .result import Cost

    document = FORMAT.load(path)
    content = document.content
    try:
        comparison = cls(
            tasks=content["tasks"],
            arms=tuple(content["arms"]),
            seeds=tuple(content["seeds"]),
            metrics={
                arm: {task: tuple(map(_or_nan, values)) for task, values in of_tasks.items()}
                for arm, of_tasks in content["metrics"].items()
            },
            costs={
                arm: tuple(Cost(**{**cost, "compute": _or_nan(cost["compute"])}) for cost in costs)
                for arm, costs in content["costs"].items()
            },
            plans={arm: tuple(plans) for arm, plans in content["plans"].items()},
            tuning={arm: {one["lr"]: one["score"] for one in scores} for arm, scores in content["tuning"].items()},
            diverged={arm: {one["seed"]: one["why"] for one in those} for arm, those in content["diverged"].items()},
            notes=tuple(content["notes"]),
            **{name: content[name] for name in ("budget", "start", "margin", "rates")},
        )
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    document.check()
    return comparison


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
