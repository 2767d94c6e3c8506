"""Counts of conflicts image by image, of blocks, of pairs of tasks, and of both at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dtme.resampling import LEVEL, MIN_UNITS, deviations, informative_units, resample_weights

from ..arms import RATIOS
from .measurement import TOKENS, Counts, Measurement

AT_MOST, BELOW, LETTER = "≤ 0", "< 0", "Algorithm 1's letter"
RULES = {
    AT_MOST: "what the product counts: a dot product of at most 0, of gradients that both have a non-zero entry",
    BELOW: "the same without dot products of exactly 0",
    LETTER: "gradients that are all zero are conflicts too, since their dot product is 0",
}
BLOCKS, PAIRS, CELLS = "blocks", "pairs", "cells"
KINDS = {BLOCKS: "blocks", PAIRS: "pairs of tasks", CELLS: "pairs in a block"}


@dataclass(frozen=True)
class Tally:
    """Conflicts of U units and X items at R ratios in both spaces."""

    hits: np.ndarray
    """(U, X, R, 2) integers: conflicts in the range and the null space."""
    valid: np.ndarray
    """(U, X) integers: (token, pair)s that could conflict."""

    @property
    def units(self) -> int:
        return len(self.hits)

    @property
    def rates(self) -> np.ndarray:
        """(X, R, 2) float64, of all units; NaN where nothing is valid."""
        return _ratio(self.hits.sum(0), self.valid.sum(0))

    def sample_rates(self, size: int) -> np.ndarray:
        """(m, X, R, 2) float64: of units [0, size), [size, 2 size), ..., as many as there are whole ones."""
        samples = self.split(size)
        return _ratio(samples.hits.sum(0), samples.valid.sum(0)).reshape(-1, *self.hits.shape[1:])

    def split(self, size: int) -> "Tally":
        """The m samples side by side, as m · X items of ``size`` units."""
        hits, valid = (
            np.moveaxis(x[: len(x) // size * size].reshape(-1, size, *x.shape[1:]), 0, 1)
            for x in (self.hits, self.valid)
        )
        return Tally(hits.reshape(size, -1, *self.hits.shape[2:]), valid.reshape(size, -1))

    def at(self, ratio: int) -> "Tally":
        return Tally(self.hits[:, :, [ratio]], self.valid)

    def total(self) -> "Tally":
        """All items as one."""
        return Tally(self.hits.sum(1, keepdims=True), self.valid.sum(1, keepdims=True))

    def first(self, units: int) -> "Tally":
        return Tally(self.hits[:units], self.valid[:units])

    def without(self, first: int, last: int) -> "Tally":
        """Without the units [first, last)."""
        return Tally(*(np.delete(x, slice(first, last), axis=0) for x in (self.hits, self.valid)))

    def columns(self) -> tuple[Tensor, Tensor]:
        """(U, X · R · 2) hits and valid."""
        valid = np.broadcast_to(self.valid[:, :, None, None], self.hits.shape)
        hits, valid = (x.reshape(self.units, -1) for x in (self.hits, valid))
        return torch.from_numpy(np.ascontiguousarray(hits)), torch.from_numpy(np.ascontiguousarray(valid))


def _ratio(hits: np.ndarray, valid: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return hits / valid[..., None, None]


def resampled(terms: Sequence[tuple[float, Tally]], level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """A sum of rates, each times its factor, and how far resamples of the units are from it.

    All tallies are resampled together, unit by unit: where they are of the same images, as those of two views or of
    two models are, what an image does to all of them stays in. Tallies of more units than another, as of images that
    were not all read with permuted labels, count by the first ones only.

    Returns:
        (X, R, 2) float64, and (1000, X, R, 2) float64, NaN below eight informative units.
    """
    units = min(tally.units for _, tally in terms)
    terms = [(factor, tally.first(units)) for factor, tally in terms]
    weights = _weights(units)
    value, around = np.zeros(()), torch.zeros((), dtype=torch.float64)
    for factor, tally in terms:
        hits, valid = tally.columns()
        value = value + factor * tally.rates
        moved = deviations(hits, valid, weights, level)
        moved[:, informative_units(valid) < MIN_UNITS] = math.nan
        around = around + factor * moved
    return value, around.numpy().reshape(len(weights), *terms[0][1].hits.shape[1:])


def intervals(terms: Sequence[tuple[float, Tally]], level: float = LEVEL) -> np.ndarray:
    """(X, R, 2, 3) float64: value and both ends of the interval of ``resampled``'s sum."""
    value, around = resampled(terms, level)
    low, high = np.quantile(around, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.stack([value, value + low, value + high], -1)


@lru_cache(maxsize=8)
def _weights(units: int) -> Tensor:
    return resample_weights(units)


@dataclass(frozen=True)
class Moment:
    """One model at one moment of its training: the sums that the report needs."""

    seed: int
    share: float
    digest: str
    default: int
    """Place of the product's ratio, or of the one that is nearest."""
    ranks: np.ndarray
    sample_ranks: np.ndarray
    tallies: Mapping[tuple[str, str], Mapping[str, Tally]]
    """(view, rule) -> kind of item -> its tally; of cells at the default ratio only."""
    batch: int
    """Images of a batch."""
    heads: Tensor | None = None
    """(n, K, 2), ``HeadLosses.losses`` of the first n batches; None where they were not measured."""

    def tally(self, kind: str, view: str = TOKENS, rule: str = AT_MOST) -> Tally:
        return self.tallies[view, rule][kind]

    def default_tally(self, kind: str, view: str = TOKENS, rule: str = AT_MOST) -> Tally:
        """At the default ratio."""
        tally = self.tally(kind, view, rule)
        return tally if kind == CELLS else tally.at(self.default)


def moment_of(found: Measurement, heads: Tensor | None = None) -> Moment:
    default = default_ratio(found.ratios)
    tallies = {(view, AT_MOST): _tallies(counts, AT_MOST, default) for view, counts in found.views.items()}
    tallies |= {(TOKENS, rule): _tallies(found.views[TOKENS], rule, default) for rule in RULES}
    ranks = found.ranks, found.sample_ranks
    return Moment(found.seed, found.share, found.digest, default, *ranks, tallies, found.batch, heads)


def default_ratio(ratios: Sequence[float]) -> int:
    """The place of the default among ``ratios``, or of the one nearest to it on a logarithmic scale."""
    return min(range(len(ratios)), key=lambda r: abs(math.log(ratios[r] / RATIOS[0])))


def _tallies(counts: Counts, rule: str, default: int) -> dict[str, Tally]:
    parts: dict[str, tuple[np.ndarray, ...]] = {AT_MOST: (counts.negative, counts.zero), BELOW: (counts.negative,)}
    possible: tuple[np.ndarray, ...] = (counts.valid,)
    if rule == LETTER:
        absent = counts.absent[..., None, None]
        parts[LETTER] = (*parts[AT_MOST], np.broadcast_to(absent, counts.negative.shape))
        possible = (counts.valid, counts.absent)

    def total(arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
        return np.sum([array.sum(axis, dtype=np.int32) for array in arrays], axis=0)

    tallies = {kind: Tally(total(parts[rule], axis), total(possible, axis)) for kind, axis in ((BLOCKS, 2), (PAIRS, 1))}
    units, blocks, pairs = counts.valid.shape
    cells = sum(array[:, :, :, [default]].astype(np.int32) for array in parts[rule])
    together = sum(array.astype(np.int32) for array in possible)
    tallies[CELLS] = Tally(np.reshape(cells, (units, blocks * pairs, 1, 2)), np.reshape(together, (units, -1)))
    return tallies
