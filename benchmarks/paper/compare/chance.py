"""How far chance alone gets: the share of the gain that random plans have, and where the plan by conflict ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dtme.comparison.statistics import LEVEL, deviation_interval, estimate

from ..report.comparison import BySeed
from ..signal.statistics import NOTHING, Interval, over_seeds
from .folders import METHOD, RANDOM, Setting

DRAWS = 20_000
"""Of what chance alone gives; always the same ones."""


@dataclass(frozen=True)
class Chance:
    """The plan by conflict among the random plans of a setting; numbers by seed are of the seeds that have both."""

    plans: dict[int, int]
    """Seed -> random plans that ran."""
    random: dict[int, list[float]]
    """Seed -> Δm of each of them over joint training."""
    share: Interval
    """The gain of random plans over that of the plan by conflict, both over joint training; with Fieller's interval.
    NaN where there is no gain to take a share of."""
    has_gain: bool
    """Whether the gain of the plan by conflict is above 0 with its whole interval."""
    ranks: BySeed
    """Seed -> the share of the random plans that the plan by conflict beats; a tie counts half."""
    rank: Interval
    """Their mean, with Student's interval from three seeds on."""
    rank_by_chance: tuple[float, float]
    """The central 95 % of that mean, were the plan by conflict one more random plan."""
    spread: Interval
    """Standard deviation between the random plans of a seed, in points of Δm, with its chi-square interval."""


def chance(setting: Setting) -> Chance | None:
    """None where the setting has no random plans."""
    if RANDOM not in setting.arms:
        return None
    pool = setting.arms[RANDOM].delta_m
    plans = {seed: [arm.delta_m[seed] for arm in setting.random if seed in arm.delta_m] for seed in pool}
    method = setting.arms[METHOD].delta_m if METHOD in setting.arms else {}
    both = [seed for seed in pool if seed in method]
    ranks = {seed: beaten(method[seed], plans[seed]) for seed in both}
    gain = estimate([method[seed] for seed in both])
    has_gain = gain.low > 0
    return Chance(
        {seed: len(values) for seed, values in plans.items()},
        plans,
        ratio_of_means([pool[seed] for seed in both], [method[seed] for seed in both]) if has_gain else NOTHING,
        has_gain,
        ranks,
        over_seeds(list(ranks.values()), 0, 1),
        rank_by_chance([len(plans[seed]) for seed in both]),
        spread_within(list(plans.values())),
    )


def beaten(value: float, others: Sequence[float]) -> float:
    """The share of ``others`` that are lower, equal ones counted as half."""
    return float(np.mean([0.5 * (value >= other) + 0.5 * (value > other) for other in others]))


def ratio_of_means(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """The ratio of two means of paired numbers, with Fieller's interval.

    All ratios q for which the mean of numerator - q denominator is not significantly other than 0 by Student's t
    (Fieller, Journal of the Royal Statistical Society B 16, 1954). NaN where the mean of the denominators is not, as
    the interval is then not bounded, and below two pairs.
    """
    n = len(denominators)
    if n < 2:
        return NOTHING
    top, bottom = float(np.mean(numerators)), float(np.mean(denominators))
    covariance = np.cov(numerators, denominators) / n
    t2 = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) ** 2
    # a q² - 2 b q + c <= 0
    a = bottom**2 - t2 * float(covariance[1, 1])
    b = top * bottom - t2 * float(covariance[0, 1])
    c = top**2 - t2 * float(covariance[0, 0])
    if a <= 0:
        return NOTHING
    half = math.sqrt(max(0.0, b * b - a * c))
    return Interval(top / bottom, (b - half) / a, (b + half) / a)


def rank_by_chance(plans: Sequence[int]) -> tuple[float, float]:
    """The central 95 % of the mean of ``beaten`` over seeds with so many random plans each, of one more random plan."""
    if not plans:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    means = np.mean([rng.integers(0, count, DRAWS, endpoint=True) / count for count in plans], axis=0)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def spread_within(groups: Sequence[Sequence[float]]) -> Interval:
    """The standard deviation within groups, each around its own mean; NaN where none has two numbers."""
    degrees = sum(len(group) - 1 for group in groups)
    if degrees < 1:
        return NOTHING
    squares = sum(float(((np.asarray(group) - np.mean(group)) ** 2).sum()) for group in groups)
    sd = math.sqrt(squares / degrees)
    return Interval(sd, *deviation_interval(sd, degrees + 1))
