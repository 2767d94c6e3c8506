"""The statistics of a comparison by seeds: intervals, tests and the number of seeds that an effect needs.

Everything rests on Student's t for the mean of differences that are about normally distributed between seeds. Two arms
share their data, order and first weights within a seed, so their difference is taken by seed and the spread between
seeds, which both have, drops out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ALPHA = 0.05
"""Level of every test; all are two-sided."""
LEVEL = 1 - ALPHA
"""Of every interval."""
POWER = 0.8
"""With which the number of seeds of ``seeds_needed`` would find the effect."""
MOST_SEEDS = 10**9


def distributions() -> Any:
    """``scipy.stats``, which is imported when it is first needed.

    Raises:
        ImportError: scipy is not installed; the message says how to install it.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError('intervals and tests need scipy: pip install "dtme-kernels[compare]"') from error
    return stats


@dataclass(frozen=True)
class Estimate:
    """Mean of a few numbers, one per seed, with what can be said of the mean of all seeds."""

    n: int
    mean: float
    """NaN of no numbers."""
    sd: float
    """Standard deviation with n - 1 in the denominator; NaN below two numbers, as is what follows from it."""
    half_width: float
    """The 95 % interval of the mean is ``mean ± half_width``: Student's t with n - 1 degrees of freedom."""
    p: float
    """Two-sided p-value of "the mean is zero", from the same t."""

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, spread, interval and test of ``values``.

    Raises:
        ValueError: one of them is not finite: what is not known is for the caller to leave out, and to say so.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError(f"values must be finite numbers in one dimension, got {values!r}")
    n = len(array)
    if n == 0:
        return Estimate(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(array.mean())
    if n == 1:
        return Estimate(1, mean, math.nan, math.nan, math.nan)
    # equal numbers differ from their mean by rounding, which is no spread
    sd = 0.0 if (array == array[0]).all() else float(array.std(ddof=1))
    error = sd / math.sqrt(n)
    half_width = float(distributions().t.ppf(0.5 + LEVEL / 2, n - 1)) * error
    if error == 0:
        return Estimate(n, mean, sd, half_width, 1.0 if mean == 0 else 0.0)
    return Estimate(n, mean, sd, half_width, float(2 * distributions().t.sf(abs(mean) / error, n - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: reject where the adjusted value is below the level of the whole family.

    The k-th smallest of m values is multiplied by m - k + 1, and none is below the one before it (Holm, 1979). NaN
    stays NaN and is not of the family.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def deviation_interval(sd: float, n: int) -> tuple[float, float]:
    """The 95 % interval of the true standard deviation, from chi-square with n - 1 degrees of freedom; NaN below 2."""
    if n < 2:
        return math.nan, math.nan
    tail = (1 - LEVEL) / 2
    most, least = distributions().chi2.ppf([1 - tail, tail], n - 1)
    return sd * math.sqrt((n - 1) / most), sd * math.sqrt((n - 1) / least)


def detectable(sd: float, n: int) -> float:
    """The least mean difference that a paired t-test over ``n`` pairs finds with a power of 80 %.

    (t(1 - α/2) + t(power)) · sd / √n, both quantiles of Student's t with n - 1 degrees of freedom; two-sided α = 5 %.
    NaN below two pairs, and where ``sd`` is.
    """
    if n < 2:
        return math.nan
    return float(distributions().t.ppf((0.5 + LEVEL / 2, POWER), n - 1).sum()) * sd / math.sqrt(n)


def seeds_needed(sd: float, effect: float) -> float:
    """The least number of pairs with which a paired t-test finds a mean difference of ``effect``.

    The least n ≥ 2 at which ``detectable(sd, n)`` is no more than it; two-sided α = 5 %, power 80 %. NaN where ``sd``
    is.

    Raises:
        ValueError: ``effect`` is not positive and finite, or ``sd`` is negative.
    """
    if not (effect > 0 and math.isfinite(effect)):
        raise ValueError(f"effect must be a positive number, got {effect!r}")
    if math.isnan(sd):
        return math.nan
    if sd < 0:
        raise ValueError(f"sd must not be negative, got {sd!r}")
    # Student's quantiles are wider than the normal ones, so that no smaller n can do
    start = (distributions().norm.ppf((0.5 + LEVEL / 2, POWER)).sum() * sd / effect) ** 2
    if start > MOST_SEEDS:
        return math.inf
    n = max(2, math.ceil(start))
    while detectable(sd, n) > effect:
        n += 1
    return n


@dataclass(frozen=True)
class Requirement:
    """How many seeds an effect of one size needs, by the spread that was measured."""

    effect: float
    pairs: int
    """Seeds that were measured."""
    seeds: float
    """Needed by the measured standard deviation; NaN below two pairs."""
    low: float
    high: float
    """Needed at the ends of the standard deviation's 95 % interval."""

    @property
    def is_settled(self) -> bool:
        return self.seeds <= self.pairs

    @property
    def more(self) -> float:
        """Seeds that are still to be run; NaN where it is not known."""
        return self.seeds if math.isnan(self.seeds) else max(0, self.seeds - self.pairs)


def requirement(differences: Estimate, effect: float) -> Requirement:
    low, high = deviation_interval(differences.sd, differences.n)
    return Requirement(
        effect,
        differences.n,
        seeds_needed(differences.sd, effect),
        seeds_needed(low, effect),
        seeds_needed(high, effect),
    )
