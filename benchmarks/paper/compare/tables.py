"""The tables of the comparison in Markdown."""

import math
from collections.abc import Iterator

from dtme.comparison.statistics import estimate
from dtme.comparison.verdict import OPEN

from ..report.comparison import Test
from ..report.provenance import times
from ..report.text import DASH, bold, bracket, duration, integer, interval, listed, percent, plain, table
from ..runner.tune import JOINT
from .answer import seeds_text
from .chance import Chance
from .claims import FAILS, HOLDS, UNTESTED, Claim, Evidence
from .findings import Findings
from .folders import METHOD, RANDOM, Setting
from .prediction import KINDS, OVERALL, PREDICTORS, SPACES, Correlation, Prediction, by_block
from .questions import NOT_PRINTED


def claims_table(findings: Findings) -> str:
    """One row per claim and setting that has the runs of it."""
    rows = [row for claim in findings.claims for row in _rows(claim)]
    rows += list(_prediction_rows(findings))
    head = ["claim", "the paper's Δm", "setting", "our Δm", "difference, points [95 %]", "seeds", "verdict"]
    return table(head, rows, left=3)


def _rows(claim: Claim) -> Iterator[list[str]]:
    first = [claim.text, claim.paper]
    for one in claim.evidence:
        e = one.estimate
        sides = " → ".join(plain(side, 2, sign=True) for side in one.sides)
        difference = bracket((e.mean, e.low, e.high), 2, sign=True)
        yield [*first, one.setting, sides, difference, str(e.n), verdict_text(one)]
        first = ["", ""]


def untested_text(findings: Findings) -> str:
    """The claims that no setting has the runs of."""
    rows = {row[0] for row in _prediction_rows(findings)}
    predicted = [text for text in map(_prediction, KINDS) if text not in rows]
    claims = [*(claim.text for claim in findings.claims if not claim.evidence), *predicted]
    return f"{UNTESTED.capitalize()} in any setting: {'; '.join(claims)}." if claims else ""


def verdict_text(one: Evidence) -> str:
    if one.word == OPEN:
        if one.estimate.n == 1:
            return f"{OPEN}: one seed has no interval"
        needed = "more seeds than can be run" if math.isinf(one.seeds) else f"{seeds_text(int(one.seeds))} in all"
        return f"{OPEN}: {needed}"
    return bold(f"{one.word}{' (contradicted)' if one.word == FAILS else ''}", one.word in (HOLDS, FAILS))


def _prediction_rows(findings: Findings) -> Iterator[list[str]]:
    """Whether the gain of a block goes with its rate, which the paper takes for granted."""
    for kind in KINDS:
        first = [_prediction(kind), NOT_PRINTED]
        for title in findings.settings:
            one = findings.predictions.get(title, {}).get(kind)
            found = None if one is None else one.correlations.get(SPACES[kind], {}).get(OVERALL)
            if one is None or found is None or not found.seeds:
                continue
            correlation = f"rank correlation {bracket(found.best, 2, sign=True)}"
            word = found.word(len(one.blocks))
            said = f"{word}{' (contradicted)' if word == FAILS else ''}"
            yield [*first, title, DASH, correlation, str(len(found.seeds)), bold(said, word != OPEN)]
            first = ["", ""]


def _prediction(kind: str) -> str:
    return f"the gain of {KINDS[kind]} in a block goes with the block's {SPACES[kind]} rate"


# --- chance -----------------------------------------------------------------------------------------------------------


def chance_table(findings: Findings) -> str:
    """What random plans reach, and where the plan by conflict stands among them."""
    rows = []
    for title, found in findings.chances.items():
        setting = findings.settings[title]
        gains = [_delta(setting, name) for name in (RANDOM, METHOD)]
        low, high = found.rank_by_chance
        band = DASH if math.isnan(low) else f"{plain(100 * low, 0)} to {plain(100 * high, 0)}"
        counts = sorted(set(found.plans.values()))
        plans = DASH if not counts else f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        rows.append([title, plans, *gains, share_text(found), percent(found.rank, 0), band, bracket(found.spread, 2)])
    head = ["setting", "random plans per seed", "Δm of random plans", "Δm by conflict", "share of the gain %"]
    return table([*head, "rank of conflict %", "by chance %", "spread of random plans"], rows)


def share_text(found: Chance) -> str:
    if found.has_gain:
        return percent(found.share, 0)
    if not found.ranks:
        return DASH
    return "no interval from one seed" if len(found.ranks) == 1 else "no gain to take a share of"


def _delta(setting: Setting, arm: str) -> str:
    return interval(estimate(list(setting.arms[arm].delta_m.values())), 2, sign=True) if arm in setting.arms else DASH


# --- arms -------------------------------------------------------------------------------------------------------------


def arms_table(setting: Setting) -> str:
    """Δm over joint training, its terms, and what every arm costs."""
    rows = []
    for arm in setting.shown:
        count = len(arm.seeds)
        total = estimate(list(arm.delta_m.values()))
        cells = [interval(estimate(list(by.values())), 2, sign=True, of=total.n) for by in arm.terms.values()]
        if arm.name == JOINT:
            cells = [plain(0.0, 2)] * len(cells)
        own = plain(0.0, 2) if arm.name == JOINT else interval(total, 2, sign=True)
        seeds = f"{count}, {len(arm.diverged)} diverged" if arm.diverged else f"{count}"
        rows.append([arm.title, seeds, own, *cells, *_costs(setting, arm.name)])
    head = ["arm", "seeds", "Δm over joint %", *setting.folder.tasks, "added parameters", "compute", "CPU × joint"]
    return table(head, rows)


def _costs(setting: Setting, arm: str) -> list[str]:
    added = [cost.added for cost in setting.arms[arm].costs.values() if not math.isnan(cost.added)]
    compute, cpu = (list(of.get(arm, {}).values()) for of in (setting.compute, setting.cpu_ratio))
    return [integer(estimate(added).mean), plain(estimate(compute).mean, 2), plain(estimate(cpu).mean, 2)]


def tests_table(findings: Findings, setting: Setting) -> str:
    """Every arm against joint training and against the random plans, and its gain per cost."""
    costs = findings.costs[setting.title]
    rows = []
    for arm in setting.shown:
        if arm.name == JOINT:
            continue
        per = costs[arm.name]
        tests = [tests.get(arm.name) for tests in (setting.against_joint, setting.against_random)]
        cells = [cell for test in tests for cell in _test(test)]
        rows.append([arm.title, *cells, *(interval(e, 2, sign=True) for e in (per.compute, per.cpu))])
    against = [text for other in ("joint", "random plans") for text in (f"Δm over {other}", "p", "Holm's p")]
    return table(["arm", *against, "per added compute", "per added CPU"], rows)


def _test(test: Test | None) -> list[str]:
    if test is None or not test.difference.n:
        return [DASH] * 3
    e = test.difference
    text = f"{bracket((e.mean, e.low, e.high), 2, sign=True)} ({e.n})"
    return [bold(text, test.is_better), p_text(e.p), p_text(test.p)]


def p_text(value: float) -> str:
    return DASH if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


# --- prediction -------------------------------------------------------------------------------------------------------


def blocks_table(found: Prediction) -> str:
    """Every block's real gain beside what was known of it."""
    gains = by_block(found.gains[OVERALL])
    known = {key: by_block(rows) for key, rows in found.predictors.items() if key != "depth"}
    rows = []
    for at, block in enumerate(found.blocks):
        cells = [_known(key, of[at]) for key, of in known.items()]
        rows.append([f"{block}", bracket(gains[at], 2, sign=True), *cells])
    return table(["block", "real gain", *(PREDICTORS[key] for key in known)], rows)


def _known(key: str, value: tuple[float, float, float]) -> str:
    return percent(value) if key in SPACES.values() else bracket(value, 4)


def correlations_table(found: Prediction) -> str:
    rows = []
    for key, by_task in found.correlations.items():
        whole, *tasks = by_task.values()
        each = listed([f"{plain(value, 2, sign=True)}" for value in whole.by_seed.values()]) or DASH
        cells = [bracket(one.best, 2, sign=True) for one in tasks]
        rows.append([PREDICTORS[key], _of_means(whole), bracket(whole.mean, 2, sign=True), each, *cells])
    tasks = list(found.gains)[1:]
    return table(["predictor", "of the means", "mean of the seeds'", "each seed's", *tasks], rows)


def _of_means(one: Correlation) -> str:
    return bracket(one.of_means, 2, sign=True)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost_table(findings: Findings) -> str:
    rows = []
    for title, setting in findings.settings.items():
        run, tuned = times(setting.folder.runs()), times(setting.tuning_runs)
        tuning = [f"{tuned['runs']}", duration(tuned["cpu"])] if setting.tuning_runs else [DASH, DASH]
        rows.append([title, f"{run['runs']}", duration(run["cpu"]), duration(run["wall"]), *tuning])
    return table(["setting", "runs", "CPU time", "wall time", "tuning runs", "their CPU time"], rows)
