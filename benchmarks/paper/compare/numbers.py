"""``compare.json``: the numbers of the page for machines. Whatever is not known is null."""

import math
from typing import Any

from dtme.comparison.statistics import LEVEL, POWER, Estimate, estimate
from dtme.comparison.verdict import MARGIN

from ..report.comparison import Test
from ..report.numbers import clean
from ..report.provenance import times
from ..report.text import without_place
from .answer import answer
from .chance import Chance
from .claims import Claim
from .commands import run_command
from .costs import PerCost, best
from .findings import Findings
from .folders import Setting
from .prediction import KINDS, OVERALL, SPACES, Correlation, Prediction, by_block, reached_by_chance
from .questions import QUESTIONS, printed_pairs, printed_shares

FORMAT = 1
DIGITS = 8
"""Significant digits."""


def numbers(findings: Findings) -> dict[str, Any]:
    content = {
        "format": FORMAT,
        "level": LEVEL,
        "power": POWER,
        "margin": MARGIN,
        "answer": answer(findings),
        "notes": findings.notes,
        "paper": {
            "delta_m": {question.key: printed_pairs(question) for question in QUESTIONS},
            "shares": printed_shares(),
        },
        "tested": sum(one.estimate.n > 1 for claim in findings.claims for one in claim.evidence),
        "claims": {claim.key: _claim(claim) for claim in findings.claims},
        "prediction_claims": _prediction_claims(findings),
        "settings": {title: _setting(findings, setting) for title, setting in findings.settings.items()},
        "time": times(
            [run for setting in findings.settings.values() for run in setting.folder.runs() + setting.tuning_runs]
        ),
    }
    return clean(content, DIGITS)  # type: ignore[no-any-return]


def _estimate(e: Estimate) -> dict[str, Any]:
    return {"n": e.n, "mean": e.mean, "sd": e.sd, "half_width": e.half_width, "low": e.low, "high": e.high, "p": e.p}


def _claim(claim: Claim) -> dict[str, Any]:
    found = {
        one.setting: {
            "verdict": one.word,
            **_estimate(one.estimate),
            "sides": one.sides,
            "seeds_needed": one.seeds,
            "by_seed": one.by_seed,
        }
        for one in claim.evidence
    }
    return {"claim": claim.text, "paper": claim.paper, "settings": found, "not_tested": claim.untested}


def _prediction_claims(findings: Findings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in KINDS:
        found[f"{kind}-{SPACES[kind]}"] = {
            title: {
                "verdict": one.word(len(kinds[kind].blocks)),
                "correlation": one.best,
                "seeds": len(one.seeds),
            }
            for title, kinds in findings.predictions.items()
            if kind in kinds
            and (one := kinds[kind].correlations.get(SPACES[kind], {}).get(OVERALL)) is not None
            and one.seeds
        }
    return found


def _setting(findings: Findings, setting: Setting) -> dict[str, Any]:
    title, folder = setting.title, setting.folder
    costs, tuned = findings.costs[title], findings.tunings[title]
    kinds = findings.predictions.get(title, {})
    return {
        "folder": setting.path.resolve().name,
        "command": run_command(setting),
        "data": folder.data,
        "experiment": folder.experiment,
        "seeds": folder.seeds,
        "tasks": list(folder.tasks),
        "settings": without_place(setting.settings),
        "lr": setting.lr,
        "tuning": {"tried": tuned.tried, "warning": tuned.warning, "tuned": setting.tuned},
        "arms": {name: _arm(setting, name, costs.get(name)) for name in setting.arms},
        "best_per_cost": {what: best(costs, what) for what in ("compute", "cpu")},
        "chance": _chance(findings.chances[title]) if title in findings.chances else None,
        "prediction": {kind: _prediction(found) for kind, found in kinds.items()},
        "time": times(folder.runs()),
        "tuning_time": times(setting.tuning_runs),
        "missing": folder.missing(),
        "diverged": folder.diverged(),
    }


def _arm(setting: Setting, name: str, costs: PerCost | None) -> dict[str, Any]:
    arm = setting.arms[name]
    added = [cost.added for cost in arm.costs.values() if not math.isnan(cost.added)]
    of_costs = {
        "added_parameters": estimate(added).mean,
        "compute": _mean(setting.compute.get(name, {})),
        "cpu_over_joint": _mean(setting.cpu_ratio.get(name, {})),
    }
    return {
        "title": arm.title,
        "seeds": arm.seeds,
        "diverged": arm.diverged,
        "delta_m": _by_seed(arm.delta_m),
        "terms": {task: _by_seed(by_seed) for task, by_seed in arm.terms.items()},
        "metrics": arm.metrics,
        **of_costs,
        "per_added_compute": None if costs is None else _estimate(costs.compute),
        "per_added_cpu": None if costs is None else _estimate(costs.cpu),
        "against_joint": _test(setting.against_joint.get(name)),
        "against_random": _test(setting.against_random.get(name)),
    }


def _mean(by_seed: dict[int, float]) -> float:
    return estimate(list(by_seed.values())).mean


def _by_seed(by_seed: dict[int, float]) -> dict[str, Any]:
    return {**_estimate(estimate(list(by_seed.values()))), "by_seed": by_seed}


def _test(test: Test | None) -> dict[str, Any] | None:
    return None if test is None else {**_by_seed(test.by_seed), "p_holm": test.p, "is_better": test.is_better}


def _chance(found: Chance) -> dict[str, Any]:
    return {
        "plans": found.plans,
        "random": found.random,
        "share": found.share,
        "has_gain": found.has_gain,
        "rank": found.rank,
        "rank_by_seed": found.ranks,
        "rank_by_chance": found.rank_by_chance,
        "spread": found.spread,
    }


def _prediction(found: Prediction) -> dict[str, Any]:
    return {
        "blocks": found.blocks,
        "seeds": found.seeds,
        "left_out": found.left_out,
        "gains": {of: _of_blocks(values) for of, values in found.gains.items()},
        "predictors": {key: _of_blocks(values) for key, values in found.predictors.items()},
        "correlations": {
            key: {of: _correlation(one) for of, one in by_task.items()} for key, by_task in found.correlations.items()
        },
        "by_chance": reached_by_chance(len(found.blocks)),
        "common": found.common,
        "reliability": found.reliability,
        "most": found.most,
    }


def _of_blocks(values: Any) -> dict[str, Any]:
    return {"mean": by_block(values), "by_seed": values.tolist()}


def _correlation(one: Correlation) -> dict[str, Any]:
    return {"seeds": one.seeds, "of_means": one.of_means, "mean": one.mean, "by_seed": one.by_seed}
