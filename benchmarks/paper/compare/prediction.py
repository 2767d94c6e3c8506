"""What predicts the gain of a block: modules in one block at a time, against what was known of the blocks before."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from dtme.comparison.statistics import LEVEL, estimate
from dtme.comparison.verdict import OPEN

from ...ranks import spearman
from ..report.folder import number
from ..results import Run
from ..signal.statistics import FEWEST, NOTHING, Interval, Rates, clipped, in_common, jackknife, over_seeds
from .claims import FAILS, HOLDS
from .folders import ONE_BLOCK, Setting

KINDS = {"tm": "TM", "te": "TE"}
SPACES = {"tm": "range", "te": "null"}
"""The space whose rate is to choose the blocks."""
PREDICTORS = {
    "range": "range rate",
    "null": "null rate",
    "gains": "first-order gain",
    "gradient_norms": "gradient norm",
    "depth": "depth",
}
"""Key of a run's report -> what it is called; the depth is the block's number."""
OVERALL = "Δm"
DRAWS = 20_000
"""Orders that show what chance gives; always the same ones."""


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over the blocks of real gains and a predictor."""

    seeds: tuple[int, ...]
    """At which both are known."""
    of_means: Interval
    """Of the means over seeds; a jackknife over the seeds from five on, unless leaving one out never changes it."""
    by_seed: dict[int, float]
    mean: Interval
    """Of those by seed, with Student's interval from three seeds on."""

    @property
    def best(self) -> Interval:
        """That of the means, unless only the other has an interval."""
        return self.mean if math.isnan(self.of_means.low) and not math.isnan(self.mean.low) else self.of_means

    def word(self, blocks: int) -> str:
        """Whether there is a correlation: its interval leaves out 0, and it is beyond what random orders reach."""
        found = self.best
        if found.low > 0 and found.value >= reached_by_chance(blocks):
            return HOLDS
        if found.high < 0 and -found.value >= reached_by_chance(blocks):
            return FAILS
        return OPEN


@dataclass(frozen=True)
class Prediction:
    """Real gains of one block at a time, of one kind of module, and what goes with them."""

    kind: str
    blocks: tuple[int, ...]
    """That have runs."""
    seeds: tuple[int, ...]
    """At which every one of them has its gain."""
    left_out: tuple[int, ...]
    """Seeds that lack one."""
    gains: dict[str, np.ndarray]
    """``OVERALL`` and every task -> (seeds, blocks), in % over joint training of the seed."""
    predictors: dict[str, np.ndarray]
    """Key of ``PREDICTORS`` -> (seeds, blocks), NaN where a run does not say; those that are known at some seed."""
    correlations: dict[str, dict[str, Correlation]]
    """Predictor -> ``OVERALL`` and every task."""
    common: Interval
    """How much of the variance between the blocks' gains at one seed is common to all seeds: an intraclass correlation
    with its F interval."""

    @property
    def reliability(self) -> Interval:
        """Likewise, of the mean over the seeds (Spearman and Brown); below 0 it counts as 0."""
        n = len(self.seeds)
        return Interval(*(max(0.0, n * x / (1 + (n - 1) * x)) if not math.isnan(x) else x for x in self.common))

    @property
    def most(self) -> Interval:
        """The largest correlation that such gains can have in the mean, were the prediction perfect."""
        return Interval(*(math.sqrt(x) if not math.isnan(x) else x for x in self.reliability))


def predictions(setting: Setting) -> dict[str, Prediction]:
    """Kind -> what its runs say; kinds with fewer than three blocks, which have no order to speak of, are left out."""
    found = {kind: _prediction(setting, kind) for kind in KINDS}
    return {kind: one for kind, one in found.items() if one is not None}


def _prediction(setting: Setting, kind: str) -> Prediction | None:
    arms = {}
    for name, arm in setting.arms.items():
        match = ONE_BLOCK.fullmatch(name)
        if match and match[1] == kind and arm.delta_m:
            arms[int(match[2])] = arm
    blocks = tuple(sorted(arms))
    if len(blocks) < 3:
        return None
    some = sorted({seed for arm in arms.values() for seed in arm.delta_m})
    seeds = tuple(seed for seed in some if all(seed in arms[block].delta_m for block in blocks))
    gains = {OVERALL: _matrix([[arms[block].delta_m[seed] for block in blocks] for seed in seeds], blocks)}
    for task in setting.folder.tasks:
        gains[task] = _matrix([[arms[block].terms[task][seed] for block in blocks] for seed in seeds], blocks)
    predictors = _predictors(setting, kind, blocks, seeds)
    correlations = {
        key: {of: correlation(values, rows, seeds) for of, values in gains.items()} for key, rows in predictors.items()
    }
    left_out = tuple(seed for seed in some if seed not in seeds)
    return Prediction(kind, blocks, seeds, left_out, gains, predictors, correlations, _common(gains[OVERALL]))


def _matrix(rows: Sequence[Sequence[float]], blocks: Sequence[int]) -> np.ndarray:
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(blocks))


def _common(gains: np.ndarray) -> Interval:
    """Joint training's own noise moves all gains of a seed alike, which a correlation of consistency leaves out."""
    models, items = gains.shape
    if models < 2:
        return NOTHING
    return in_common(Rates(gains, np.zeros((models, items, models, items)), 1))


def _predictors(setting: Setting, kind: str, blocks: Sequence[int], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    runs = {
        (seed, block): setting.folder.complete(setting.folder.arms[f"{kind}-at-{block}"])[seed][0]
        for block in blocks
        for seed in seeds
    }
    found = {}
    for key in PREDICTORS:
        rows = [[_known(runs[seed, block], key, block) for block in blocks] for seed in seeds]
        values = _matrix(rows, blocks)
        if np.isfinite(values).all(axis=1).any():
            found[key] = values
    return found


def _known(run: Run, key: str, block: int) -> float:
    """What the run's analysis says of the block; all runs of a seed start from the same model and read the same."""
    if key == "depth":
        return float(block)
    values = ((run.get("structure") or {}).get("report") or {}).get(key)
    return number(values[block]) if isinstance(values, list) and block < len(values) else math.nan


def correlation(gains: np.ndarray, predictor: np.ndarray, seeds: Sequence[int]) -> Correlation:
    """Of two (seeds, blocks), over the seeds at which both are known for all blocks."""
    known = np.isfinite(gains).all(axis=1) & np.isfinite(predictor).all(axis=1)
    y, x = gains[known], predictor[known]
    by_seed = {
        seed: spearman(*pair)
        for seed, *pair in zip((s for s, is_known in zip(seeds, known, strict=True) if is_known), y, x, strict=True)
    }
    if not by_seed:
        return Correlation((), NOTHING, {}, NOTHING)
    left = [_of_means(np.delete(y, i, 0), np.delete(x, i, 0)) for i in range(len(y))] if len(y) >= FEWEST else []
    of_means = clipped(jackknife(_of_means(y, x), left), -1, 1)
    if of_means.low == of_means.high:  # a few seeds without which the order is the same do not show that it always is
        of_means = Interval(of_means.value)
    return Correlation(tuple(by_seed), of_means, by_seed, over_seeds(list(by_seed.values()), -1, 1))


def _of_means(gains: np.ndarray, predictor: np.ndarray) -> float:
    return spearman(gains.mean(0), predictor.mean(0))


@cache
def reached_by_chance(blocks: int) -> float:
    """The rank correlation, without its sign, that 5 % of all random orders of so many blocks reach."""
    rng = np.random.default_rng(0)
    orders = rng.permuted(np.tile(np.arange(blocks), (DRAWS, 1)), axis=1)
    correlations = 1 - 6 * ((orders - np.arange(blocks)) ** 2).sum(1) / (blocks * (blocks**2 - 1))
    ordered = np.sort(np.abs(correlations))[::-1]
    for value in np.unique(ordered):  # the least value that no more than 5 % reach
        if (ordered >= value - 1e-9).mean() <= 1 - LEVEL:
            return float(value)
    return math.inf


def by_block(of: np.ndarray) -> list[Interval]:
    """The mean over seeds of every block of (seeds, blocks), with Student's interval."""
    found = []
    for column in of.T:
        e = estimate([value for value in column if math.isfinite(value)])
        found.append(Interval(e.mean, e.low, e.high))
    return found
