"""What a comparison found: every run's metrics and costs, and what they decide."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..files import write_beside
from ..pickles import Stamped
from ..plan import ExpansionPlan
from . import answers, records, table
from .answers import Answer
from .arms import JOINT
from .delta import delta_m
from .metrics import DIRECTIONS, LOWER
from .verdict import BETTER, EQUAL, MARGIN, OPEN, WORSE, Verdict, verdict


@dataclass(frozen=True)
class Cost:
    """What one run cost.

    Attributes:
        added: parameters of the tasks' own, beyond those of the plain model.
        compute: passes through the plain model's blocks in all steps of training, over those of joint training for the
            budget; NaN where it is not known.
        steps: of optimisation.
        seconds: of training, with the joint part, and of the analysis where the arm needs one.
    """

    added: int
    compute: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Comparison(Stamped):
    """What ``dtme.compare`` returns; ``print`` it.

    Attributes:
        tasks: ``{task: "higher" | "lower"}``, where its metric gets better.
        arms: their names, in order.
        seeds: those that are compared.
        metrics: ``{arm: {task: one number for each seed}}``; NaN of a run that diverged.
        costs: ``{arm: one Cost for each seed}``.
        plans: ``{arm: one plan for each seed}`` of the arms that have plans; None of a run that diverged before it.
        budget, start: steps of a run, and how many of them are joint.
        margin: in points of Δm: differences within ± this are no difference.
        rates: ``{arm: learning rate}``.
        tuning: ``{arm: {learning rate: score}}`` where several were tried; None of one that diverged.
        diverged: ``{arm: {seed: why}}`` of the runs that did.
        notes: what else is to be known.
    """

    tasks: Mapping[str, str]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    metrics: Mapping[str, Mapping[str, tuple[float, ...]]]
    costs: Mapping[str, tuple[Cost, ...]]
    plans: Mapping[str, tuple[ExpansionPlan | None, ...]]
    budget: int
    start: int
    margin: float = MARGIN
    rates: Mapping[str, float] = field(default_factory=dict)
    tuning: Mapping[str, Mapping[float, float | None]] = field(default_factory=dict)
    diverged: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """ValueError where the parts do not fit each other."""
        if unknown := [task for task, direction in self.tasks.items() if direction not in DIRECTIONS]:
            raise ValueError(f"tasks[{unknown[0]!r}] must be 'higher' or 'lower', got {self.tasks[unknown[0]]!r}")
        if not self.tasks or not self.seeds or JOINT not in self.arms:
            raise ValueError(f"a comparison needs tasks, seeds and the arm {JOINT!r}")
        for name in ("metrics", "costs"):
            if set(getattr(self, name)) != set(self.arms):
                raise ValueError(f"{name} must be of the arms {list(self.arms)}, got {list(getattr(self, name))}")
        for arm in self.arms:
            if set(self.metrics[arm]) != set(self.tasks):
                raise ValueError(f"metrics[{arm!r}] must be of {list(self.tasks)}, got {list(self.metrics[arm])}")
            for values in (*self.metrics[arm].values(), self.costs[arm], self.plans.get(arm, self.seeds)):
                if len(values) != len(self.seeds):
                    raise ValueError(
                        f"arm {arm!r} must have {len(self.seeds)} seeds, and has {len(values)} of something"
                    )
        for name in ("plans", "rates", "tuning", "diverged"):
            if others := [arm for arm in getattr(self, name) if arm not in self.arms]:
                raise ValueError(f"{name} names the unknown arm {others[0]!r}")

    # --- what it says -------------------------------------------------------------------------------------------------

    def delta_m(self, arm: str) -> tuple[float, ...]:
        """Δm of every seed in %: the mean gain of the tasks over joint training of the same seed; higher is better.

        NaN where one of the two diverged, or a metric of joint training is not above zero: nothing is relative to that.
        """
        return self._gains(arm)[0]

    def gains(self, arm: str) -> dict[str, tuple[float, ...]]:
        """``{task: its term of Δm for every seed}`` in %."""
        return self._gains(arm)[1]

    def difference(self, arm: str, other: str | Sequence[str] = JOINT) -> Verdict:
        """By how many points of Δm ``arm`` is better than ``other`` of the same seed, and whether that is settled.

        Args:
            other: an arm, or several, whose mean of the seed is taken.

        Returns:
            the verdict over the seeds of which both are known. An arm that diverged in any seed is never better, nor
            one that others are called no different from; and nothing is settled while a seed lacks a Δm though none of
            its runs diverged, which leaves seeds out by their result.

        Raises:
            ValueError: an unknown arm, or none.
        """
        others = (other,) if isinstance(other, str) else tuple(other)
        if not others:
            raise ValueError("other must name at least one arm")
        ours, theirs = self.delta_m(arm), [self.delta_m(one) for one in others]
        differences = [mine - math.fsum(values) / len(others) for mine, *values in zip(ours, *theirs, strict=True)]
        found = verdict([value for value in differences if math.isfinite(value)], self.margin)
        diverged = {seed for one in (arm, JOINT, *others) for seed in self.diverged.get(one, ())}
        undefined = any(
            not math.isfinite(value) and seed not in diverged
            for seed, value in zip(self.seeds, differences, strict=True)
        )
        barred = {
            BETTER: bool(self.diverged.get(arm)),
            WORSE: any(self.diverged.get(one) for one in others),
            EQUAL: bool(diverged),
        }
        return replace(found, word=OPEN) if undefined or barred.get(found.word) else found

    @property
    def answers(self) -> tuple[Answer, ...]:
        """What a user asks, as far as its arms were run: see ``answers_of``."""
        return answers.answers_of(self)

    @property
    def settled(self) -> bool:
        """Whether there are questions and all of them are answered."""
        found = self.answers
        return bool(found) and all(answer.verdict.is_settled for answer in found)

    @property
    def next_step(self) -> str:
        """What to do with it, in a sentence or two."""
        return answers.next_step(self)

    def __str__(self) -> str:
        return table.summary(self)

    # --- files --------------------------------------------------------------------------------------------------------

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw every arm against joint training: a dot for each seed, the mean and its interval.

        Args:
            path: of a picture in a format that matplotlib writes.
        """
        from .picture import draw

        figure = draw(self)
        write_beside(Path(path), lambda beside: figure.savefig(beside, dpi=150))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write readable JSON; floats survive exactly."""
        records.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Comparison":
        """Read what ``save`` wrote; ValueError names the file and what is wrong with it."""
        return records.load(cls, path)

    # --- for the modules beside this one ------------------------------------------------------------------------------

    @property
    def lower_is_better(self) -> tuple[str, ...]:
        return tuple(task for task, direction in self.tasks.items() if direction == LOWER)

    def _gains(self, arm: str) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
        if arm not in self.arms:
            raise ValueError(f"arm must be one of {list(self.arms)}, got {arm!r}")
        totals: list[float] = []
        terms: dict[str, list[float]] = {task: [] for task in self.tasks}
        for i in range(len(self.seeds)):
            ours, base = ({task: self.metrics[one][task][i] for task in self.tasks} for one in (arm, JOINT))
            is_known = all(math.isfinite(value) for value in (*ours.values(), *base.values()))
            total, parts = math.nan, dict.fromkeys(self.tasks, math.nan)
            if is_known and min(base.values()) > 0:
                total, parts = delta_m(ours, base, self.lower_is_better)
            totals.append(total)
            for task, part in parts.items():
                terms[task].append(part)
        return tuple(totals), {task: tuple(values) for task, values in terms.items()}
