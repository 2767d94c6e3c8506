"""All that the page, its numbers and its figures show."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..report.provenance import differing_facts
from ..report.text import bracket, listed
from .chance import Chance, chance
from .claims import HOLDS, Claim, claims
from .costs import PerCost, Tuning, per_cost, tuning
from .folders import METHOD, Setting
from .prediction import Prediction, predictions


@dataclass(frozen=True)
class Findings:
    """By the title of the setting, where nothing else is said."""

    settings: dict[str, Setting]
    claims: list[Claim]
    chances: dict[str, Chance]
    """Of the settings with random plans."""
    predictions: dict[str, dict[str, Prediction]]
    """Title -> kind of module; of the settings with modules in one block at a time."""
    costs: dict[str, dict[str, PerCost]]
    """Title -> arm."""
    tunings: dict[str, Tuning]
    notes: list[str]
    """What a reader has to know before the numbers, worst first."""


def find(settings: Sequence[Setting]) -> Findings:
    by_title = {setting.title: setting for setting in settings}
    chances = {title: chance(setting) for title, setting in by_title.items()}
    blocks = {title: predictions(setting) for title, setting in by_title.items()}
    tunings = {title: tuning(setting) for title, setting in by_title.items()}
    asked = claims(settings)
    return Findings(
        by_title,
        asked,
        {title: found for title, found in chances.items() if found is not None},
        {title: found for title, found in blocks.items() if found},
        {title: per_cost(setting) for title, setting in by_title.items()},
        tunings,
        [*_notes(settings, tunings), *_unfinished(asked)],
    )


def _notes(settings: Sequence[Setting], tunings: dict[str, Tuning]) -> list[str]:
    notes = [f"{title}: {found.warning}" for title, found in tunings.items() if found.warning]
    for setting in settings:
        folder, title = setting.folder, setting.title
        for count, one, more in (
            (len(folder.missing()), "is missing", "are missing"),
            (len(folder.diverged()), "diverged", "diverged"),
        ):
            if count:
                notes.append(f"{title}: {count} run{f's {more}' if count > 1 else f' {one}'}; listed at the end.")
        if METHOD not in setting.arms or not setting.arms[METHOD].seeds:
            notes.append(f"{title}: there is no run of {METHOD}, which most claims are about.")
        notes += [f"{title}: {text}" for text in (*_uneven(setting), *differing_facts(folder.runs()))]
    return notes


def _unfinished(asked: Sequence[Claim]) -> list[str]:
    """Where joint training was not at its end, so that training for longer is what gains."""
    longer = next(claim for claim in asked if claim.key == "longer-joint")
    return [
        f"{one.setting}: joint training was not at its end; with the additional steps that the compute of TM + TE "
        f"stands for, it gains {bracket((one.estimate.mean, one.estimate.low, one.estimate.high), 2)} points."
        for one in longer.evidence
        if one.word == HOLDS
    ]


def _uneven(setting: Setting) -> list[str]:
    """Where seeds do not have the same random plans."""
    lacking = {
        seed: count
        for seed in setting.joint.seeds
        if (count := sum(seed in arm.delta_m for arm in setting.random)) < len(setting.random)
    }
    if not lacking:
        return []
    text = listed([f"{count} at seed {seed}" for seed, count in lacking.items()])
    return [f"of its {len(setting.random)} random plans, there are only {text}: the mean is of those."]
