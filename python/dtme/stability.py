"""How far the plan of a report hangs on what happened to be read."""

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .resampling import LEVEL, MIN_UNITS, informative_units, resample_weights
from .selection import Candidates, Choice, Rules

if TYPE_CHECKING:
    from .report import ConflictReport

MOST_TIMES = 1024
"""Beyond so many times what was read, nobody is told to read more."""


def stability(report: "ConflictReport", plan_options: Mapping[str, Any]) -> dict[str, Tensor]:
    """{"modulation", "expansion"}: (D,), in which share of the resamples ``plan`` chooses the block; NaN if unknown."""
    candidates, _ = candidates_of(report, plan_options)
    weights = _weights(candidates)
    if weights is None:
        return {kind: torch.full((len(report.blocks),), math.nan, dtype=torch.float64) for kind in Choice._fields}
    chosen = candidates.choose(weights)
    shares = {kind: torch.zeros(len(report.blocks), dtype=torch.float64) for kind in Choice._fields}
    for kind, added in zip(Choice._fields, chosen, strict=True):
        shares[kind][candidates.shared] = added.any(2).double().mean(0)
    return shares


def agreement(report: "ConflictReport", **plan_options: Any) -> float:
    """In which share of the resamples ``plan(**plan_options)`` is, in all that it chooses, the plan of the report.

    NaN where that is unknown: with fewer than 8 units, or fewer in which a block had anything valid.
    """
    candidates, chosen = candidates_of(report, plan_options)
    weights = _weights(candidates)
    return math.nan if weights is None else _agreement(candidates, chosen, weights)


def batches_to_settle(report: "ConflictReport", confidence: float = LEVEL, **plan_options: Any) -> int | None:
    """About how many more batches it takes until ``agreement`` reaches ``confidence``: 0 if it does now.

    Rates are taken to stay what they are, and the deviations of their resamples to shrink with the root of what is
    read. None where ``agreement`` is unknown, or where more than 1,024 times what was read would be needed.
    """
    candidates, chosen = candidates_of(report, plan_options)
    weights, times = _weights(candidates), 1
    if weights is None:
        return None
    while times <= MOST_TIMES:
        if _agreement(candidates, chosen, weights, 1 / math.sqrt(times)) >= confidence:
            return report.num_batches * (times - 1)
        times *= 2
    return None


def candidates_of(report: "ConflictReport", plan_options: Mapping[str, Any]) -> tuple[Candidates, Choice]:
    """What ``report.plan(**plan_options)`` chooses from, and what it chooses; ValueError where that raises it."""
    candidates = Candidates(report, rules_of(plan_options))
    return candidates, candidates.choose()


def rules_of(plan_options: Mapping[str, Any]) -> Rules:
    """The options of ``ConflictReport.plan``, checked as far as they can be without a report."""
    from .report import ConflictReport

    asked = inspect.signature(ConflictReport.plan).bind(None, **plan_options)  # defaults and names are those of plan
    asked.apply_defaults()
    return Rules(**{name: value for name, value in asked.arguments.items() if name != "self"})


def _weights(candidates: Candidates) -> Tensor | None:
    """(R, n) of the resamples; None where there is too little to resample for a plan."""
    report, gains = candidates.report, "gain" in candidates.rules.sources
    if report.units is None or len(report.units.batches) < MIN_UNITS or (gains and report.gain_resamples is None):
        return None
    if (informative_units(report.units.valid.sum(2))[candidates.shared] < MIN_UNITS).any():
        return None
    weights = resample_weights(len(report.units.batches))
    return weights[: len(report.gain_resamples)] if gains and report.gain_resamples is not None else weights


def _agreement(candidates: Candidates, chosen: Choice, weights: Tensor, scale: float = 1.0) -> float:
    same = torch.ones(len(weights), dtype=torch.bool)
    for own, resampled in zip(chosen, candidates.choose(weights, scale), strict=True):
        same &= (own == resampled).flatten(1).all(1)
    return same.double().mean().item()
