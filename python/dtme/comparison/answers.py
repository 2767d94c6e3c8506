"""The questions that a comparison is made for, what its runs answer, and what to do next."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arms import ADAPTERS, CONFLICT, JOINT, LONGER, is_random
from .verdict import BETTER, EQUAL, WORSE, Verdict

if TYPE_CHECKING:
    from .result import Comparison

MOST_MORE = 100
"""Seeds beyond which nobody will run more: the difference is too small for its spread."""
FEWEST = 5
"""Seeds to begin with, where one alone was run."""
PLACES = ("first", "last", "all")
AGAINST_JOINT, AGAINST_LONGER, PLACEMENT, ADAPTER = "joint", "longer", "placement", "adapter"


@dataclass(frozen=True)
class Answer:
    """One comparison of the conflict plan with something else.

    Attributes:
        kind: ``"joint"``, ``"longer"``, ``"placement"`` or ``"adapter"``.
        question: in words.
        others: the arms that it is compared with; of several, their mean of each seed.
        verdict: over the seeds, in points of Δm.
    """

    kind: str
    question: str
    others: tuple[str, ...]
    verdict: Verdict

    @property
    def mean(self) -> float:
        """Of the difference in points of Δm, higher is better."""
        return self.verdict.difference.mean

    @property
    def half_width(self) -> float:
        """Of its 95 % interval; NaN below two seeds."""
        return self.verdict.difference.half_width

    @property
    def n(self) -> int:
        """Seeds of which both sides are known."""
        return self.verdict.difference.n

    @property
    def more(self) -> float:
        """Seeds that would settle it; 0 where it is settled, NaN where that is not known."""
        return self.verdict.more

    def __str__(self) -> str:
        if self.n == 0:
            return f"{self.question} Not known: there is no seed in which both sides have a Δm."
        if self.n == 1:
            return f"{self.question} {self.mean:+.2f} points of Δm in one seed, which cannot decide anything."
        said = f"{self.mean:+.2f} ± {self.half_width:.2f} points of Δm over {self.n} seeds"
        words = {
            BETTER: "Yes",
            WORSE: "No, it is worse",
            EQUAL: f"No difference of {self.verdict.margin:g} points or more",
        }
        if (word := words.get(self.verdict.word)) is not None:
            return f"{self.question} {word}: {said}."
        return f"{self.question} Not settled: {said}; {more_in_words(self.more)} would settle it."


def answers_of(comparison: "Comparison") -> tuple[Answer, ...]:
    """The four questions, each as far as its arms were run; none without the conflict plan.

    1. Is the conflict plan better than joint training for as many steps?
    2. Is it better than joint training for as much compute, in more steps?
    3. Is it better than the mean of the random plans of the seed, and than other places for the modules?
    4. Is it better than each kind of adapter with as many parameters?
    """
    if CONFLICT not in comparison.arms:
        return ()
    return tuple(
        Answer(kind, question, others, comparison.difference(CONFLICT, others))
        for kind, question, others in _questions(comparison.arms)
    )


def _questions(arms: tuple[str, ...]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    yield AGAINST_JOINT, "Is conflict better than joint training at equal steps?", (JOINT,)
    if LONGER in arms:
        yield AGAINST_LONGER, "Is conflict better than longer joint training at equal compute?", (LONGER,)
    if draws := tuple(arm for arm in arms if is_random(arm)):
        what = "a random plan" if len(draws) == 1 else f"the mean of {len(draws)} random plans"
        yield PLACEMENT, f"Is conflict better than {what} of the same size?", draws
    for arm in PLACES:
        if arm in arms:
            where = "all blocks" if arm == "all" else f"the {arm} blocks"
            yield PLACEMENT, f"Is conflict better than modules in {where}?", (arm,)
    for arm in ADAPTERS:
        if arm in arms:
            yield ADAPTER, f"Is conflict better than {arm} with as many parameters?", (arm,)


def more_in_words(more: float) -> str:
    """So many more seeds."""
    if math.isnan(more):
        return "more seeds"
    if more > MOST_MORE:
        return f"more than {MOST_MORE} more seeds"
    return f"about {more:.0f} more seed{'s' if more != 1 else ''}"


def next_step(comparison: "Comparison") -> str:
    """What to do: run more seeds, or what the answers speak for."""
    if CONFLICT not in comparison.arms:
        return "Nothing is asked without the arm 'conflict': add it to the arms."
    count = len(comparison.seeds)
    if count < 2:
        return f"One seed cannot decide anything: run {FEWEST - 1} more, seeds={FEWEST}."
    for arm in (CONFLICT, JOINT, LONGER):
        if arm in comparison.diverged:
            return (
                f"Runs of {arm} diverged, so that not everything can be settled: lower lr, or give several to choose "
                "from."
            )
    found = comparison.answers
    first = found[0].verdict
    if first.word in (WORSE, EQUAL):
        how = "worse than it" if first.word == WORSE else "no better"
        return f"Keep joint training: expanding by conflict is {how} at equal steps."
    if (open_ones := [answer for answer in found if not answer.verdict.is_settled]) and not first.is_settled:
        return _run_more(comparison.seeds, [found[0]], "the first question")
    for answer in found[1:]:
        if answer.kind == AGAINST_LONGER and answer.verdict.word in (WORSE, EQUAL):
            return "Train jointly for longer: expanding by conflict is better at equal steps, but not at equal compute."
        if answer.kind == ADAPTER and answer.verdict.word == WORSE:
            return f"Use {answer.others[0]}: with as many parameters, it is better than expanding by conflict."
    if open_ones:
        what = "the open question" if len(open_ones) == 1 else "the open questions"
        return _run_more(comparison.seeds, open_ones, what)
    if any(answer.kind == PLACEMENT and answer.verdict.word != BETTER for answer in found):
        return (
            "Expand: it is better than joint training. Which blocks get the modules matters little here: other places "
            'do as well as those of the conflicts, and the last blocks cost the least compute: plan(strategy="last").'
        )
    return (
        "Expand by conflict: it is better than everything that it was compared with."
        if all(answer.verdict.word == BETTER for answer in found)
        else "Expand by conflict: it is better than joint training, and nothing that it was compared with is better."
    )


def _run_more(seeds: tuple[int, ...], open_ones: list[Answer], what: str) -> str:
    if any(answer.n < len(seeds) for answer in open_ones):
        return (
            "More seeds do not settle what lacks a Δm in some of them: give metrics that joint training has above "
            "zero, as errors."
        )
    known = [answer.more for answer in open_ones if not math.isnan(answer.more)]
    reach = [more for more in known if more <= MOST_MORE]
    if not reach:
        return (
            f"Take it as undecided: it would need more than {MOST_MORE} more seeds to tell so small a difference from "
            "none. The cheaper arm is the safe choice."
        )
    more = math.ceil(max(reach))
    rest = "" if len(reach) == len(known) else f", though some would take more than {MOST_MORE}"
    plural, count = "s" if more != 1 else "", len(seeds)
    how = f"seeds={count + more}" if seeds == tuple(range(count)) else f"other than {', '.join(map(str, seeds))}"
    return f"Run {more} more seed{plural}, {how}, which should settle {what}{rest}."
