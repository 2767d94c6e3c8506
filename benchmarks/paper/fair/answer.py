"""What came out, in sentences that say no more than the numbers do."""

from typing import Any

from dtme.comparison.statistics import ALPHA

from ..report.text import interval, plain
from ..runner.tune import JOINT
from .comparison import Effect, Effects, Result, Study, cpu_seconds, training_seconds
from .conditions import DOUBLE, TUNED
from .tables import names

VERDICTS = {
    -1: "negative transfer",
    0: "neither a gain nor a loss is decided",
    1: "positive transfer",
    None: "one seed decides nothing",
}
CHANGED = {-1: "lower", 0: "not decided", 1: "higher", None: "not known from one seed"}


def answer(study: Study) -> list[str]:
    """Sentences, each to stand alone, the main one first."""
    said = [_whole(study)]
    said += [_condition(result) for result in study.results.values() if JOINT in result.transfer]
    said += _left(study)
    said += [
        f"{_capital(change.title)}: Δm changes by {_with(change.effects.total)}, "
        f"{_word(change.effects.total, CHANGED)}{_tasks(change.effects, CHANGED)}."
        for change in study.changes
        if change.effects.total.estimate.n
    ]
    said += [
        f"Unlike with unlike, {title}: Δm {_with(found.total, '%')}, {_word(found.total, VERDICTS)}."
        for title, found in study.mixed.values()
        if found.total.estimate.n
    ]
    return said + _cost(study)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _word(effect: Effect, words: dict[Any, str]) -> str:
    return "the same at every seed" if effect.is_none else words[effect.sign]


def _with(effect: Effect, unit: str = "points") -> str:
    e = effect.estimate
    seeds = f"{e.n} seed{'s' * (e.n != 1)}"
    return f"{interval(e, 2, sign=True)} {unit} ({seeds})"


def _whole(study: Study) -> str:
    """The question and its answer, under the condition that answers it."""
    result = study.results.get(TUNED)
    found = None if result is None else result.transfer.get(JOINT)
    if found is None or not any(effect.estimate.n for effect in found.tasks.values()):
        return "Whether there is negative transfer with both tuned is not known: no seed has both sides' runs."
    if all(effect.sign is None for effect in found.tasks.values()):
        return "Whether there is negative transfer with both tuned is not known: an interval takes two seeds."
    losing, open_ = found.with_sign(-1), found.with_sign(0)
    surely = [task for task in losing if found.tasks[task].p < ALPHA]
    text = f"with both tuned, joint training loses on {names(losing)}" if losing else ""
    if losing:
        after = "also" if surely == losing else f"{names(surely)} also" if surely else "not"
        text += f" ({after} after Holm's correction over tasks)" if len(found.tasks) > 1 else ""
    else:
        text = "with both tuned, joint training loses on no task as far as these seeds can tell"
    if gaining := found.with_sign(1):
        text += f"; it gains on {names(gaining)}"
    if open_:
        least = [f"{task} {plain(found.tasks[task].smallest, 1)} %" for task in open_]
        text += f"; not decided: {names(open_)} (smallest effect found with a power of 80 %: {', '.join(least)})"
    return f"Negative transfer: {text}."


def _condition(result: Result) -> str:
    found = result.transfer[JOINT]
    total = found.total
    if not total.estimate.n:
        return f"{_capital(result.condition.title)}: Δm of joint training is not known."
    text = f"{_capital(result.condition.title)}: Δm of joint training {_with(total, '%')}, {_word(total, VERDICTS)}"
    if total.sign == 0 and not total.is_none:
        text += f", where {plain(total.smallest, 2)} % would be found with a power of 80 %"
    return text + _tasks(found, {-1: "loses", 1: "gains"}) + "."


def _tasks(found: Effects, words: dict[Any, str]) -> str:
    """The tasks whose effect is decided."""
    parts = []
    for sign in (-1, 1):
        if decided := found.with_sign(sign):
            each = [f"{task} ({interval(found.tasks[task].estimate, 2, sign=True)})" for task in decided]
            parts.append(f"{words[sign]} on {names(each)}")
    return f"; {', '.join(parts)}" if parts else ""


def _left(study: Study) -> list[str]:
    """What is left of the negative transfer over all that was tried."""
    tried = sum(len(result.transfer) for result in study.results.values())
    losing = study.losing()
    always = [task for task, where in losing.items() if tried and len(where) == tried]
    never = [task for task, where in losing.items() if not where]
    said = []
    if tried < 2:
        return said
    if always:
        said.append(f"Under all of the {tried} conditions and weightings, joint training loses on {names(always)}.")
    some = [f"{task} ({'; '.join(where)})" for task, where in losing.items() if 0 < len(where) < tried]
    if some:
        said.append(f"Under some of the {tried} only: {names(some)}.")
    if never:
        said.append(f"Under none of the {tried} a loss is decided on {names(never)}.")
    return said


def _cost(study: Study) -> list[str]:
    result = study.results.get(TUNED) or next(iter(study.results.values()))
    ratio, cpu = result.cost_ratio(training_seconds), result.cost_ratio(cpu_seconds)
    if not ratio.n:
        return []
    tasks = len(study.tasks)
    said = [
        f"At equal steps the sides do not cost the same: the {tasks} single-task runs of a seed take "
        f"{interval(ratio, 2)} times the training time of one joint run, {interval(cpu, 2)} times its CPU time with "
        "evaluation."
    ]
    double = study.results.get(DOUBLE)
    if double is not None and TUNED in study.results:
        longer = result.cost_ratio(training_seconds, double)
        said.append(
            f"Against a joint run of {double.condition.steps} steps, single-task runs of {result.condition.steps} take "
            f"{interval(longer, 2)} times the training time."
        )
    return said
