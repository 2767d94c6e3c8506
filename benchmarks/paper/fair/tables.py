"""The tables of the report on fair joint training, in Markdown."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from dtme.comparison.statistics import ALPHA, estimate

from ..report.provenance import times
from ..report.text import DASH, bold, duration, interval, listed, plain, table
from .comparison import Effect, Effects, Result, Study, cpu_seconds, training_seconds

TRANSFER = {-1: "loses", 0: "not decided", 1: "gains", None: "not known"}
"""What an effect's sign says of a task that is trained jointly."""
CHANGE = {-1: "lower", 0: "not decided", 1: "higher", None: "not known"}
READING = (
    "Mean ± half-width of the 95 % interval over seeds (Student's t). {words}; **bold** where it also stands after "
    "Holm's correction over the tasks of its row (of Δm, which is one number: p below 5 %). – is what is not known, as "
    "any interval of fewer than two seeds."
)
TRANSFER_WORDS = "*Loses*: the whole interval is below 0; *gains*: above 0; *not decided*: 0 is in it"
CHANGE_WORDS = "*Lower*, *higher*: the whole interval is below or above 0; *not decided*: 0 is in it"


def rows_of(study: Study) -> Iterator[tuple[Result, str, Effects]]:
    """(condition, arm, its effects), like with like."""
    for result in study.results.values():
        for arm, found in result.transfer.items():
            yield result, arm, found


def _cell(effect: Effect, words: dict[int | None, str]) -> str:
    e = effect.estimate
    if not e.n:
        return DASH
    text = f"{interval(e, 2, sign=True)} {'the same' if effect.is_none else words[effect.sign]}"
    return bold(text, bool(effect.sign) and effect.p < ALPHA)


def _cells(found: Effects, words: dict[int | None, str]) -> list[str]:
    everything = [*found.tasks.values(), found.total]
    return [*(_cell(effect, words) for effect in everything), str(found.total.estimate.n)]


def _head(study: Study, *first: str) -> list[str]:
    return [*first, *study.tasks, "Δm", "seeds"]


def transfer_table(study: Study) -> str:
    rows = [[r.condition.title, r.arms[arm].title, *_cells(found, TRANSFER)] for r, arm, found in rows_of(study)]
    return table(_head(study, "condition", "arm"), rows, left=2)


def detail_table(study: Study) -> str:
    """Every effect with its p-values and with the smallest effect that its seeds could find."""
    rows = []
    for result, arm, found in rows_of(study):
        for name, effect in [*found.tasks.items(), ("Δm", found.total)]:
            e = effect.estimate
            values = [interval(e, 2, sign=True), plain(e.sd, 2), _p(e.p)]
            holm = DASH if name == "Δm" else _p(effect.p)
            found_at = [TRANSFER[effect.sign], plain(effect.smallest, 2), str(e.n)]
            rows.append([result.condition.title, result.arms[arm].title, name, *values, holm, *found_at])
    head = [
        "condition",
        "arm",
        "task",
        "% against single",
        "standard deviation",
        "p",
        "Holm's p",
        "",
        "smallest effect",
    ]
    return table([*head, "seeds"], rows, left=3)


def _p(value: float) -> str:
    return DASH if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def changes_table(study: Study) -> str:
    rows = [[change.title, *_cells(change.effects, CHANGE)] for change in study.changes]
    return table(_head(study, "change"), rows) if rows else ""


def sides_table(study: Study) -> str:
    """What a change of the conditions does to the metrics of each arm itself."""
    arms = next(iter(study.results.values())).arms
    rows = [
        [change.title, arms[arm].title, *_cells(found, CHANGE)]
        for change in study.changes
        for arm, found in change.sides.items()
    ]
    return table([*_head(study, "change", "arm")[:-2], "mean", "seeds"], rows, left=2) if rows else ""


def mixed_table(study: Study) -> str:
    rows = [[title, *_cells(found, TRANSFER)] for title, found in study.mixed.values()]
    return table(_head(study, "comparison"), rows) if rows else ""


def metrics_table(study: Study) -> str:
    """The metrics themselves, single-task runs included."""
    rows = []
    for result in study.results.values():
        for arm in result.arms.values():
            cells = [interval(estimate(list(by.values())), 3, of=len(arm.seeds)) for by in arm.metrics.values()]
            rows.append([result.condition.title, arm.title, *cells, str(len(arm.seeds))])
    return table(["condition", "arm", *(task.heading for task in study.tasks.values()), "seeds"], rows, left=2)


def tuning_table(result: Result) -> str:
    """The score of every rate that was tried."""
    rates = sorted({rate for facts in result.tuned.values() for rate in facts.get("tried", {})}, key=float)
    rows = [
        [name, *(_score(facts, rate) for rate in rates), "at the edge" if facts.get("is_at_edge") else ""]
        for name, facts in result.tuned.items()
    ]
    return table(["arm", *rates, ""], rows)


def _score(facts: dict[str, Any], rate: str) -> str:
    if rate not in facts.get("tried", {}):
        return ""
    value = facts["tried"][rate]
    is_chosen = math.isclose(float(rate), facts["lr"], rel_tol=1e-5)  # as text, a rate has six digits
    return bold(DASH if value is None else plain(float(value), 2, sign=True), is_chosen)


def cost_table(study: Study) -> str:
    rows = []
    for result in study.results.values():
        run, tuned = times(result.runs), times(result.tuning_runs)
        tuning = [f"{tuned['runs']}", duration(tuned["cpu"]), duration(tuned["wall"])]
        if not result.condition.is_tuned:
            tuning = [DASH, DASH, DASH]
        ratios = [interval(result.cost_ratio(of), 2) for of in (training_seconds, cpu_seconds)]
        rows.append(
            [result.condition.title, f"{run['runs']}", duration(run["cpu"]), duration(run["wall"]), *tuning, *ratios]
        )
    head = ["condition", "runs", "CPU time", "wall time", "tuning runs", "CPU time", "wall time"]
    return table([*head, "single / joint, training time", "single / joint, CPU time"], rows)


def conditions_table(study: Study) -> str:
    """What was set under every condition, and the rates that its runs had."""
    rows = []
    for condition in study.conditions.values():
        result = study.results.get(condition.key)
        if result is None:
            rows.append([condition.folder, condition.title, str(condition.steps), DASH, "not run", DASH])
            continue
        settings = result.comparison.folder.settings
        rates = {name: f"{facts['lr']:g}" for name, facts in result.tuned.items()}
        said = listed([f"{name} {rate}" for name, rate in rates.items()]) or f"{result.lr:g} for all"
        seeds = listed(result.comparison.folder.seeds)
        rows.append(
            [condition.folder, condition.title, str(condition.steps), f"{settings['weight_decay']:g}", said, seeds]
        )
    return table(["folder", "condition", "steps", "weight decay", "learning rates", "seeds"], rows, left=6)


def names(tasks: Sequence[str]) -> str:
    """A list in words."""
    return " and ".join([", ".join(tasks[:-1]), tasks[-1]] if len(tasks) > 1 else tasks)
