"""What the runs cost, what a gain costs, and whether an arm was tuned more than another."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dtme.comparison.statistics import Estimate, estimate

from ..report.comparison import BySeed
from ..report.text import listed
from ..runner.tune import JOINT
from .folders import RANDOM, Setting


@dataclass(frozen=True)
class PerCost:
    """Δm over joint training per cost beyond joint training's, by seed."""

    compute: Estimate
    """Per forward pass of the shared model that is added."""
    cpu: Estimate
    """Per CPU time of joint training that is added."""


def per_cost(setting: Setting) -> dict[str, PerCost]:
    """Arm -> what its gain costs; not joint training, nor where an arm costs no more than it."""
    return {
        arm.name: PerCost(*(_over(arm.delta_m, of.get(arm.name, {})) for of in (setting.compute, setting.cpu_ratio)))
        for arm in setting.shown
        if arm.name != JOINT
    }


def _over(gains: BySeed, costs: Mapping[int, float]) -> Estimate:
    return estimate([gain / (costs[seed] - 1) for seed, gain in gains.items() if costs.get(seed, 0) > 1])


def best(of: Mapping[str, PerCost], what: str) -> str | None:
    """The arm with the highest mean of those whose whole interval is above 0; None if there is none."""
    found = {arm: getattr(costs, what) for arm, costs in of.items()}
    surely = [arm for arm, e in found.items() if e.low > 0]
    return max(surely, key=lambda arm: found[arm].mean) if surely else None


@dataclass(frozen=True)
class Tuning:
    """How learning rates were chosen."""

    tried: dict[str, int]
    """Arm -> rates that were tried, of the arms that have runs; 0 where none was."""
    sentence: str
    warning: str
    """Empty where no arm was tuned more than another."""


def tuning(setting: Setting) -> Tuning:
    arms = [name for name, arm in setting.arms.items() if name != RANDOM and (arm.seeds or arm.diverged)]
    labels = {name: [key for key in setting.tuned if key == name or key.startswith(f"{name}.")] for name in arms}
    tried = {name: max([len(setting.tuned[key]["tried"]) for key in keys], default=0) for name, keys in labels.items()}
    if not any(tried.values()):
        rates = sorted({run["settings"].get("lr") for run in setting.folder.runs()}, key=str)
        return Tuning(tried, _untuned(rates, setting.lr), _other_rates(setting, rates))
    counts = sorted(set(tried.values()))
    said = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    sentence = f"The learning rate of every arm was chosen among {said} rates, on seeds and items of their own"
    if len(counts) == 1:
        return Tuning(tried, f"{sentence}: none was tuned more than another.", "")
    groups = [f"{listed([arm for arm, n in tried.items() if n == count])} at {count}" for count in reversed(counts)]
    further = [arm for arm, count in tried.items() if count > counts[0]]
    if counts[0] and not any(setting.tuned[key].get("is_at_edge", True) for arm in further for key in labels[arm]):
        beyond = f"the best was at an end for {listed(further)}, where one beyond it was tried as well, and not chosen"
        return Tuning(tried, f"{sentence}: {beyond}, so that no arm had a choice that others had not.", "")
    return Tuning(
        tried,
        f"{sentence}.",
        f"ARMS WERE NOT TUNED ALIKE: {'; '.join(groups)} learning rates. What was tuned more may be better for that "
        "alone. (The runner tries one rate more where the best of three is at an end.)",
    )


def _untuned(rates: list[float], default: float) -> str:
    if len(rates) == 1 and rates[0] is not None:
        return f"No learning rate was tuned in this folder: every arm has {rates[0]:g}, and none was tuned more."
    shown = listed([f"{rate:g}" if isinstance(rate, float) else "one that is not known" for rate in rates])
    return f"No learning rate was tuned in this folder, whose default is {default:g}; the runs have {shown}."


def _other_rates(setting: Setting, rates: list[float]) -> str:
    """A warning where arms that were not tuned have different rates."""
    if len(rates) < 2:
        return ""
    by_arm = {
        name: sorted({run["settings"].get("lr", math.nan) for run in arm.all()})
        for name, arm in setting.folder.arms.items()
        if arm.runs
    }
    groups = [f"{name} {', '.join(f'{rate:g}' for rate in found)}" for name, found in by_arm.items()]
    return f"ARMS HAVE DIFFERENT LEARNING RATES, and none is said to be tuned: {'; '.join(groups)}."
