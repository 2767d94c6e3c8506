"""How sure a rate is: the units of an analysis are drawn again and again, and the rates of every draw looked at."""

import math
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

NUM_RESAMPLES = 1000
MIN_UNITS = 8
"""Fewer units say too little of how much units differ: there are no intervals then."""
LEVEL = 0.95
"""The level that is shown, and at which resamples are stretched where a plan is made of every one of them."""
CHANCE = 0.5
"""The rate of gradients that have nothing to do with each other."""
CHUNK = 1024  # columns at a time: the pairs of a hundred tasks would take a resample of gigabytes


def resample_weights(num_units: int, num_resamples: int = NUM_RESAMPLES) -> Tensor:
    """(R, n) float64: how often each of n units is drawn in each resample; always the same for the same n and R."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(num_units, (num_resamples, num_units), generator=generator)
    weights = torch.zeros(num_resamples, num_units, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def deviations(counts: Tensor, valid: Tensor, weights: Tensor, level: float = LEVEL) -> Tensor:
    """How far the rates of resamples are from the rate of all units, stretched for small samples.

    A resample varies by less than a new sample would: its variance lacks the factor n / (n - 1), and its quantiles are
    those of a normal distribution where the few units only support those of Student's. Both matter at 8 to 20 units.

    Args:
        counts, valid: (n, X) integers; a rate is a ratio of their sums over the units.
        weights: (R, n), of ``resample_weights``.
        level: the confidence at which quantiles of the result will be read.

    Returns:
        (R, X) float64. Zero where a resample holds nothing valid.
    """
    total = weights @ valid.double()
    rates = (weights @ counts.double()).div_(total)
    rates -= counts.sum(0).double() / valid.sum(0).double()
    # of the units in which nothing was valid a rate learns nothing; two are the fewest that can differ
    informative = informative_units(valid).clamp(min=2).tolist()
    rates *= torch.tensor([stretch(n, level) for n in informative], dtype=torch.float64)
    return rates.nan_to_num_(0.0)


def informative_units(valid: Tensor) -> Tensor:
    """(X,) int64: in how many of the units of ``valid`` (n, X) anything is valid."""
    return (valid > 0).sum(0)


def rate_intervals(counts: Tensor, valid: Tensor, level: float) -> Tensor:
    """(X, 2) float64 from (n, X) counts: both ends of the interval, NaN below ``MIN_UNITS`` informative units."""
    edges = torch.full((counts.shape[1], 2), math.nan, dtype=torch.float64)
    known = (informative_units(valid) >= MIN_UNITS).nonzero().flatten()
    if not len(known):
        return edges
    weights = resample_weights(len(counts))
    quantiles = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    for columns in known.split(CHUNK):
        hits, possible = counts[:, columns], valid[:, columns]
        rates = hits.sum(0).double() / possible.sum(0).double()
        around = deviations(hits, possible, weights, level).quantile(quantiles, dim=0).T
        edges[columns] = (rates[:, None] + around).clamp_(0, 1)
    return edges


@lru_cache(maxsize=4096)
def stretch(num_units: int, level: float) -> float:
    """By how much the deviations of resamples of n units have to grow for their quantiles to hold at ``level``."""
    normal = NormalDist().inv_cdf((1 + level) / 2)
    return math.sqrt(num_units / (num_units - 1)) * student_quantile(num_units - 1, level) / normal


def student_quantile(degrees: int, level: float) -> float:
    """The t that a variable of Student's distribution stays within on both sides with probability ``level``.

    The distribution function is a finite sum in the angle atan(t / √degrees) for whole degrees of freedom.
    """

    def within(angle: float) -> float:
        cosine, square = math.cos(angle), math.cos(angle) ** 2
        total = term = 1.0
        for k in range(1, degrees // 2):
            term *= square * (2 * k / (2 * k + 1) if degrees % 2 else (2 * k - 1) / (2 * k))
            total += term
        if degrees % 2 == 0:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + (math.sin(angle) * cosine * total if degrees > 1 else 0.0))

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < level else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)
