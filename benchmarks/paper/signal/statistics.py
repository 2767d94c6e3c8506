"""The statistics of the signal: agreement of plans, jackknives, components of variance, reliability."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from scipy import stats

from dtme.comparison.statistics import LEVEL, estimate
from dtme.selection import Rules

from ...ranks import rank_correlations
from .tallies import Tally

IMAGE_GROUPS = 20
"""Left out one by one where an interval over images comes from a jackknife."""
FEWEST = 5
"""Parts that a jackknife needs: fewer can agree by chance, which would look like certainty."""


class Interval(NamedTuple):
    """A number with its 95 % interval; its ends are NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


NOTHING = Interval(math.nan)


def over_seeds(values: Sequence[float], low: float = -math.inf, high: float = math.inf) -> Interval:
    """Mean of numbers that are one per seed, with Student's t interval from three on: that of two says nothing.

    Numbers that are all the same have none either: a few seeds that agree do not show that all would.

    Args:
        values: those that are not finite are left out.
        low, high: what the numbers themselves cannot leave, nor does the interval.
    """
    e = estimate([value for value in values if math.isfinite(value)])
    return clipped(Interval(e.mean, e.low, e.high), low, high) if e.n > 2 and e.sd > 0 else Interval(e.mean)


def proportion(hits: int, of: int) -> Interval:
    """A share of ``of`` independent trials, with Wilson's interval."""
    if not of:
        return NOTHING
    ends = stats.binomtest(hits, of).proportion_ci(LEVEL, method="wilson")
    return Interval(hits / of, float(ends.low), float(ends.high))


def clipped(interval: Interval, low: float, high: float) -> Interval:
    return Interval(*(min(high, max(low, x)) if not math.isnan(x) else x for x in interval))


# --- plans ------------------------------------------------------------------------------------------------------------


def quota(items: int) -> int:
    """How many of the items the product chooses by default: half."""
    return Rules(0.5, 0.5, "conflict", 1, None, 0, None, None, None).quotas(items)[0]


def chosen(rates: np.ndarray) -> np.ndarray:
    """(..., X) bool: the half with the highest rates, ties to the earlier, what has no rate last."""
    order = np.argsort(-rates, axis=-1, kind="stable")
    mask = np.zeros(rates.shape, dtype=bool)
    np.put_along_axis(mask, order[..., : quota(rates.shape[-1])], True, axis=-1)
    return mask


class Agreement(NamedTuple):
    """(m, m) each: of every two of m sets of rates."""

    overlap: np.ndarray
    """|A ∩ B| / |A| of the chosen halves."""
    equal: np.ndarray
    """1 where the halves are the same, else 0."""
    correlation: np.ndarray
    """Spearman's, of the rates."""


def agreement(rates: np.ndarray) -> Agreement:
    """Of the rows of (m, X) rates."""
    sets = chosen(rates).astype(np.float64)
    overlap = sets @ sets.T / quota(rates.shape[1])
    return Agreement(overlap, (overlap > 1 - 1e-9).astype(np.float64), rank_correlations(rates))


class RandomOverlap(NamedTuple):
    expected: float
    low: float
    high: float
    equal: float
    """The probability of two equal sets."""


def random_overlap(items: int, size: int) -> RandomOverlap:
    """The overlap of two random sets of ``size`` of ``items``: hypergeometric; expectation and central 95 %."""
    law = stats.hypergeom(items, size, size)
    low, high = law.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2]) / size
    return RandomOverlap(size / items, float(low), float(high), 1 / math.comb(items, size))


def over_pairs(matrices: Sequence[np.ndarray]) -> Interval:
    """The mean over the pairs of samples of each model, then over models; a matrix (m, m) per model.

    Pairs that share a sample are not independent: the interval is a jackknife over the samples, the models given, with
    Student's quantile. Of too few samples, two of some model or ``FEWEST`` less the models in all, a jackknife says
    nothing: the interval is then one over the models' means.
    """
    sizes = [len(matrix) for matrix in matrices]
    sums = [(matrix.sum() - np.trace(matrix)) for matrix in matrices]
    means = [total / (m * (m - 1)) if m > 1 else math.nan for total, m in zip(sums, sizes, strict=True)]
    degrees = sum(sizes) - len(sizes)
    if min(sizes, default=0) < 3 or degrees < FEWEST - 1:
        return over_seeds(means)
    variance = 0.0
    for matrix, total, m in zip(matrices, sums, sizes, strict=True):
        left = (total - 2 * (matrix.sum(1) - np.diag(matrix))) / ((m - 1) * (m - 2))
        variance += (m - 1) / m * ((left - left.mean()) ** 2).sum() / len(matrices) ** 2
    half = float(stats.t.ppf(0.5 + LEVEL / 2, degrees)) * math.sqrt(variance)
    mean = float(np.mean(means))
    return Interval(mean, mean - half, mean + half) if half > 0 else Interval(mean)


def jackknife(value: float, left_out: Sequence[float]) -> Interval:
    """The interval of a number from what it is with each of n parts left out (Tukey); NaN below ``FEWEST``."""
    n = len(left_out)
    if n < FEWEST or not np.isfinite([value, *left_out]).all():
        return Interval(value)
    error = math.sqrt((n - 1) / n * float(((np.asarray(left_out) - np.mean(left_out)) ** 2).sum()))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * error
    return Interval(value, value - half, value + half)


# --- variance ---------------------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """Rates of S models and X items, in one space, and the covariance of their sampling noise."""

    rates: np.ndarray
    """(S, X)."""
    noise: np.ndarray
    """(S, X, S, X), of the rates of U images, clustered by image."""
    units: int


def with_noise(tallies: Sequence[Tally], space: int, ratio: int = 0) -> Rates:
    """Of models that read equally many images.

    A rate is a ratio of sums h and v over images; to first order it moves by the mean of (h_u - rate v_u) / mean(v), so
    that the covariance of two rates is that of these residuals over U. Two models that read the same images share
    part of their noise, which the covariance between models has.
    """
    residuals, rates = [], []
    for tally in tallies:
        rate = tally.rates[:, ratio, space]
        residuals.append((tally.hits[:, :, ratio, space] - rate * tally.valid) / tally.valid.mean(0))
        rates.append(rate)
    units, items = residuals[0].shape
    together = np.concatenate(residuals, axis=1)
    noise = together.T @ together / (units * (units - 1))
    return Rates(np.stack(rates), noise.reshape(len(rates), items, len(rates), items), units)


def sum_of_squares(second: np.ndarray, within: Sequence[int]) -> float:
    """The sum of squares of an effect from second moments y yᵀ, of shape (a, b, ..., a, b, ...).

    Along the axes in ``within`` y is centred, over the others it is averaged (and counted as often as they are long).
    """
    for axis in reversed(range(second.ndim // 2)):
        other = axis + second.ndim // 2
        mean = second.sum((axis, other)) / second.shape[axis]
        second = np.trace(second, axis1=axis, axis2=other) - mean if axis in within else mean
    return float(second)


def components(second: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Components of variance of a balanced crossed random-effects model, by the method of moments.

    Every set T of factors has an effect of variance s_T, the largest set being what no other explains. With one number
    per cell, E MS_T = Σ_{T' ⊇ T} s_{T'} Π_{f ∉ T'} n_f (Searle, Casella and McCulloch, *Variance Components*, 1992),
    which is solved from the largest set down. Factors of one level are left out.

    Args:
        second: y yᵀ, of shape (a, b, ..., a, b, ...); less the covariance of the noise, it is the noise's expectation
            that is taken out of every mean square.
        names: of the factors.

    Returns:
        name of the effect, its factors joined by " × " -> variance; can be negative, as an estimate of a small one.
    """
    sizes = second.shape[: len(names)]
    factors = [f for f, size in enumerate(sizes) if size > 1]
    found: dict[tuple[int, ...], float] = {}
    for count in range(len(factors), 0, -1):
        for effect in combinations(factors, count):
            mean_square = sum_of_squares(second, effect) / math.prod(sizes[f] - 1 for f in effect)
            for larger, variance in found.items():
                if set(effect) < set(larger):
                    mean_square -= variance * math.prod(sizes[f] for f in factors if f not in larger)
            found[effect] = mean_square / math.prod(sizes[f] for f in factors if f not in effect)
    return {" × ".join(names[f] for f in effect): found[effect] for effect in sorted(found, key=lambda e: (len(e), e))}


class CellComponents(NamedTuple):
    """Of rates by seed, block and pair."""

    variances: dict[str, float]
    noise: float
    """Variance of a cell's rate between samples of one image."""

    def shares(self, images: int) -> dict[str, float]:
        """Of the total variance of a cell's rate from a sample of so many images; negative estimates count as 0."""
        parts = {name: max(0.0, variance) for name, variance in self.variances.items()}
        parts["sample"] = self.noise / images
        total = sum(parts.values())
        return {name: part / total if total else math.nan for name, part in parts.items()}


def cell_components(cells: Rates, blocks: int, seeds: Sequence[int] | None = None) -> CellComponents:
    """Of the cells (block, pair) of all models, or of some; pairs without a rate somewhere are left out."""
    models = [*range(len(cells.rates))] if seeds is None else list(seeds)
    rates = cells.rates[models].reshape(len(models), blocks, -1)
    known = np.isfinite(rates).all((0, 1))
    noise = cells.noise[models][:, :, models].reshape(rates.shape * 2)[:, :, known][..., known]
    rates = rates[:, :, known]
    names = ("seed", "block", "pair")
    second = np.multiply.outer(rates, rates) - noise
    size = rates.size
    variance = float(np.trace(noise.reshape(size, size))) / size * cells.units if size else math.nan
    return CellComponents(components(second, names) if size else {}, variance)


class Profile(NamedTuple):
    """Variances of the rates of items, such as blocks, each model's own mean left out."""

    within: float
    """Between the items of one model, without noise; can be negative, as an estimate of a small one."""
    noise: float
    """Of a sample of one image."""

    def total(self, images: float) -> float:
        """Between the items of one model as a sample of so many images shows them."""
        return max(0.0, self.within) + self.noise / images

    @property
    def signal(self) -> float:
        """Variance per variance of the noise of one image: a reliability of s n / (s n + 1) at n images."""
        return self.within / self.noise if self.noise > 0 else math.nan


def profile(of: Rates) -> Profile:
    rates, noise = _known(of)
    places, items = range(len(rates)), rates.shape[1]
    if items < 2:
        return Profile(math.nan, math.nan)
    per_image = float(np.mean([sum_of_squares(noise[s, :, s], [0]) for s in places])) / (items - 1) * of.units
    observed = float(np.mean([sum_of_squares(np.outer(rates[s], rates[s]), [0]) for s in places])) / (items - 1)
    return Profile(observed - per_image / of.units, per_image)


def _known(of: Rates) -> tuple[np.ndarray, np.ndarray]:
    """Rates and noise of the items that have a rate in all models."""
    known = np.isfinite(of.rates).all(0)
    return of.rates[:, known], of.noise[:, known][..., known]


def in_common(of: Rates) -> Interval:
    """What share of the variance between the items, as all images show it, all models have in common.

    The intraclass correlation of consistency of one model, ICC(3,1), with the exact interval that the F distribution
    gives (Shrout and Fleiss, Psychological Bulletin 86, 1979); it takes items and their differences between models as
    normal. The noise that models share because they read the same images is taken out of the items' mean square: its
    expectation for the value, its 95 % limits for the ends, which makes the interval wider, never narrower. An estimate
    below 0, which no true value is, has the upper end that one of 0 would have: not less is known to be in common.
    """
    rates, noise = _known(of)
    models, items = rates.shape
    if min(models, items) < 2:
        return NOTHING
    degrees = items - 1, (items - 1) * (models - 1)
    (between, rest), (with_shared, alone) = (
        [sum_of_squares(second, axes) / d for axes, d in zip(([1], [0, 1]), degrees, strict=True)]
        for second in (np.multiply.outer(rates, rates), noise)
    )
    if rest <= 0:
        return NOTHING
    tail = 0.5 + LEVEL / 2
    shared = max(0.0, with_shared - alone)
    least, most = stats.chi2.ppf([1 - tail, tail], degrees[0]) / degrees[0]
    ends = (
        between - shared,
        (between - shared * most) / stats.f.ppf(tail, *degrees),
        max(between - shared * least, rest) * stats.f.ppf(tail, *reversed(degrees)),
    )
    ratios = [max(0.0, end) / rest for end in ends]
    return Interval(*(float((ratio - 1) / (ratio + models - 1)) for ratio in ratios))


@dataclass(frozen=True)
class Reliability:
    """A profile with the intervals of what follows from it."""

    profile: Profile
    signal: Interval
    """Jackknife over groups of images, the models given."""
    common: Interval
    """``in_common``, as all images show it."""
    units: int

    def at(self, images: float) -> Interval:
        """The reliability within a model."""
        return Interval(*(_saturated(s, images) for s in self.signal))

    def sharpness(self, images: float) -> Interval:
        """Standard deviation between items at so many images over what their noise alone gives; 1 is only noise."""
        return Interval(*(math.sqrt(max(s * images + 1, 0.0)) for s in self.signal))  # in this order NaN stays NaN

    def across(self, images: float) -> Interval:
        """Between models: what share of the variance at so many images all have in common; below 0 it counts as 0."""
        total = self.profile.total(images)
        if not total > 0:
            return NOTHING
        times = self.profile.total(self.units) / total
        return clipped(Interval(*(times * x for x in self.common)), 0, 1)

    def images_for(self, reliability: float) -> Interval:
        """Images at which the reliability is reached; infinite where more images do not help."""
        odds = reliability / (1 - reliability)
        value, low, high = (odds / s if s > 0 else math.inf if not math.isnan(s) else s for s in self.signal)
        return Interval(value, high, low)  # the larger the signal, the fewer images


def _saturated(signal: float, images: float) -> float:
    grown = max(signal, 0.0) * images  # in this order NaN stays NaN
    return grown / (grown + 1) if math.isfinite(grown) else grown


def reliability(tallies: Sequence[Tally], space: int, ratio: int = 0) -> Reliability:
    of = with_noise(tallies, space, ratio)
    whole = profile(of)
    edges = np.linspace(0, of.units, min(IMAGE_GROUPS, of.units // 4) + 1).round().astype(int).tolist()
    parts = [
        profile(with_noise([tally.without(first, last) for tally in tallies], space, ratio)).signal
        for first, last in pairwise(edges)
    ]
    return Reliability(whole, jackknife(whole.signal, parts), in_common(of), of.units)
