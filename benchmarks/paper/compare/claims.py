"""The evidence for and against every claim, by setting."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dtme.comparison.statistics import Estimate, estimate
from dtme.comparison.verdict import BETTER, EQUAL, OPEN, WORSE, Verdict, verdict

from ..models import UNTRAINED, is_pretrained
from ..report.comparison import BySeed
from ..report.text import setting as said
from .folders import METHOD, RANDOM, Setting
from .questions import NOT_PRINTED, QUESTIONS, Question, printed_text

HOLDS, FAILS, UNTESTED = "holds", "does not hold", "not tested"
WORDS = {BETTER: HOLDS, WORSE: FAILS, EQUAL: EQUAL, OPEN: OPEN}
TOKENS = {"t-1": "six in the text; the printed parameter counts are those of one"}
"""What the paper says of a claim besides Δm."""


@dataclass(frozen=True)
class Evidence:
    """What the runs of a setting, or of two, say of a claim."""

    setting: str
    by_seed: BySeed
    """Differences in points of Δm, of the seeds that both sides have."""
    verdict: Verdict
    sides: tuple[float, float]
    """Mean Δm of the side that is compared with, and of the other, over these seeds."""

    @property
    def word(self) -> str:
        return WORDS[self.verdict.word]

    @property
    def estimate(self) -> Estimate:
        return self.verdict.difference

    @property
    def seeds(self) -> float:
        """In all, that would settle it; NaN where it is settled, or where nothing is known of the spread."""
        return math.nan if self.verdict.is_settled else self.estimate.n + self.verdict.more


@dataclass(frozen=True)
class Claim:
    key: str
    text: str
    paper: str
    group: str
    evidence: list[Evidence]
    untested: list[str]
    """Titles of the settings that do not have both sides at a seed."""


def evidence(title: str, new: BySeed, old: BySeed) -> Evidence | None:
    """``new`` against ``old``, by seed; None where no seed has both."""
    seeds = [seed for seed in new if seed in old]
    if not seeds:
        return None
    by_seed = {seed: new[seed] - old[seed] for seed in seeds}
    sides = tuple(estimate([side[seed] for seed in seeds]).mean for side in (old, new))
    return Evidence(title, by_seed, verdict(list(by_seed.values())), sides)  # type: ignore[arg-type]


def claims(settings: Sequence[Setting]) -> list[Claim]:
    """Every question, then what is asked of several settings at once."""
    return [*(_claim(question, settings) for question in QUESTIONS), *_across(settings)]


def _claim(question: Question, settings: Sequence[Setting]) -> Claim:
    there, untested = [], []
    for setting in settings:
        new, old = (setting.arms.get(name) for name in (question.arm, question.against))
        found = None if new is None or old is None else evidence(setting.title, new.delta_m, old.delta_m)
        if found is None:
            untested.append(setting.title)
        else:
            there.append(found)
    paper = TOKENS.get(question.key) or printed_text(question)
    return Claim(question.key, question.claim, paper, question.group, there, untested)


# --- from one setting to another --------------------------------------------------------------------------------------


def _across(settings: Sequence[Setting]) -> list[Claim]:
    """Claims about two settings: the gain in one minus that in the other, by seed."""
    asked = (
        ("pretrained", "the gain is larger with a pretrained backbone", pretrained_pairs(settings), False),
        ("tasks", "the gain is larger with more tasks", task_pairs(settings), False),
        (
            "tasks-random",
            "what conflict gains over random blocks is larger with more tasks",
            task_pairs(settings),
            True,
        ),
    )
    found = []
    for key, text, pairs, over_random in asked:
        there = [_between(new, old, over_random) for new, old in pairs]
        untested = [f"{old.title} → {new.title}" for (new, old), one in zip(pairs, there, strict=True) if one is None]
        found.append(Claim(key, text, NOT_PRINTED, "", [one for one in there if one is not None], untested))
    return found


def _between(new: Setting, old: Setting, over_random: bool) -> Evidence | None:
    title = f"{old.title} → {new.title}"
    gains = [_gain(setting, over_random) for setting in (new, old)]
    return evidence(title, *gains)


def _gain(setting: Setting, over_random: bool) -> BySeed:
    """Δm of TM + TE over joint training, or over random plans."""
    if METHOD not in setting.arms or (over_random and RANDOM not in setting.arms):
        return {}
    method = setting.arms[METHOD].delta_m
    if not over_random:
        return method
    random = setting.arms[RANDOM].delta_m
    return {seed: value - random[seed] for seed, value in method.items() if seed in random}


def pretrained_pairs(settings: Sequence[Setting]) -> list[tuple[Setting, Setting]]:
    """(pretrained, drawn weights) of one architecture, where nothing else differs in the settings."""
    return [
        (new, old)
        for new in settings
        for old in settings
        if METHOD in new.arms
        and METHOD in old.arms
        and is_pretrained(_backbone(new))
        and _backbone(old) == UNTRAINED + _backbone(new)
        and _without(new, "backbone") == _without(old, "backbone")
    ]


def _backbone(setting: Setting) -> str:
    return str(setting.settings.get("backbone", ""))


def task_pairs(settings: Sequence[Setting]) -> list[tuple[Setting, Setting]]:
    """(more tasks, the next fewer) of settings that differ in their tasks only, all with tuned rates or none."""
    groups: dict[str, dict[int, list[Setting]]] = {}
    for setting in settings:
        if METHOD in setting.arms:
            same = said(_without(setting, "tasks") | {"is_tuned": bool(setting.tuned)})
            groups.setdefault(same, {}).setdefault(len(setting.folder.tasks), []).append(setting)
    return [
        (new, old)
        for group in groups.values()
        for fewer, more in pairwise(sorted(group))
        for old in group[fewer]
        for new in group[more]
    ]


def _without(setting: Setting, name: str) -> dict[str, object]:
    """The settings without one of them, or of the data's options."""
    options = setting.settings.get("options") or {}
    kept = {key: value for key, value in options.items() if key != name}
    return {key: value for key, value in setting.settings.items() if key != name} | {"options": kept}
