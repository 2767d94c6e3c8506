"""Does "no rate is surely other than 0.5" tell trained heads from untrained ones?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dtme.analysis.heads import HEAD_BATCHES
from dtme.heads import label_gain, shows_learning
from dtme.resampling import CHANCE, LEVEL

from .measurement import PERMUTED, TOKENS
from .statistics import over_seeds, proportion
from .tallies import AT_MOST, BLOCKS, Moment, Tally, intervals

SAMPLES = (64, 256, 1024)
LABELS, EVERY, AT_ONCE, MEAN, APART = "labels", "every", "at once", "mean", "apart"
CRITERIA = {
    LABELS: "the loss of some task is not surely 1 % lower with the images' own labels than with other images'",
    EVERY: "the 95 % interval of every block's rate in both spaces holds 0.5",
    AT_ONCE: "likewise, with intervals that hold all at once with 95 % (Bonferroni)",
    MEAN: "the 95 % intervals of the rate of all blocks and pairs hold 0.5 in both spaces",
    APART: "the intervals of every block's rate less that with permuted labels hold 0, all at once with 95 %",
}
RATE, DISTANCE = "mean rate", "mean rate less that with permuted labels"
Found = dict[Any, Any]


def warned(moment: Moment, n: int) -> dict[str, dict[str, np.ndarray]]:
    """View -> criterion -> (m,) bool: whether it would warn, for the disjoint samples of n images."""
    blocks = moment.tally(BLOCKS).valid.shape[1]
    at_once = 1 - (1 - LEVEL) / (2 * blocks)
    found: dict[str, dict[str, np.ndarray]] = {}
    tallies = {view: moment.default_tally(BLOCKS, view) for view in views(moment)}
    for view, tally in tallies.items():
        found[view] = {
            EVERY: _all_hold(tally.split(n), CHANCE, LEVEL, blocks),
            AT_ONCE: _all_hold(tally.split(n), CHANCE, at_once, blocks),
            MEAN: _all_hold(tally.total().split(n), CHANCE, LEVEL, 1),
        }
    if PERMUTED in tallies:
        units = tallies[PERMUTED].units
        real, other = tallies[TOKENS].first(units).split(n), tallies[PERMUTED].split(n)
        found[TOKENS][APART] = _all_hold(real, 0, at_once, blocks, other)
    if moment.heads is not None:
        found[TOKENS] = {LABELS: _by_labels(moment.heads, n // moment.batch)} | found[TOKENS]
    return found


def _by_labels(losses: Tensor, batches: int) -> np.ndarray:
    """(m,) bool: whether reports of so many batches, each of which looks at the first ones only, would name a task."""
    batches = min(batches, HEAD_BATCHES)
    if batches < 2 or len(losses) < batches:
        return np.zeros(0, dtype=bool)
    samples = losses[: len(losses) // batches * batches].split(batches)
    flags = [not all(shows_learning(*label_gain(losses)) for losses in sample.unbind(1)) for sample in samples]
    return np.array(flags, dtype=bool)


def views(moment: Moment) -> list[str]:
    return [view for view in (TOKENS, PERMUTED) if (view, AT_MOST) in moment.tallies]


def _all_hold(samples: Tally, what: float, level: float, items: int, minus: Tally | None = None) -> np.ndarray:
    """(m,) bool: whether the intervals of all items of a sample hold ``what``; those without one say nothing."""
    if not samples.valid.size:
        return np.zeros(0, dtype=bool)
    terms = [(1.0, samples)] if minus is None else [(1.0, samples), (-1.0, minus)]
    edges = intervals(terms, level)[:, 0].reshape(-1, 2 * items, 3)
    holds = (edges[..., 1] <= what) & (edges[..., 2] >= what)
    return (holds | np.isnan(edges[..., 1])).all(1)


def warning(by_share: Mapping[float, Sequence[Moment]]) -> Found:
    """By number of images: how often each criterion warns at each share, and how well that tells them apart."""
    units = next(iter(by_share.values()))[0].tally(BLOCKS).units
    found: Found = {}
    for n in [n for n in SAMPLES if n <= units]:
        counts: dict[tuple[str, str], dict[float, list[np.ndarray]]] = {}
        for share, moments in by_share.items():
            for moment in moments:
                for view, criteria in warned(moment, n).items():
                    for criterion, flags in criteria.items():
                        counts.setdefault((view, criterion), {}).setdefault(share, []).append(flags)
        found[n] = {"samples": units // n, "warned": {}, "separation": {}}
        for (view, criterion), shares in counts.items():
            rows = {share: np.concatenate(flags) for share, flags in shares.items()}
            if not all(map(len, rows.values())):
                continue  # fewer images were read with permuted labels
            found[n]["warned"].setdefault(view, {})[criterion] = {
                f"{share:g}": proportion(int(flags.sum()), len(flags)) for share, flags in rows.items()
            }
            trained = [flags.mean() for share, flags in rows.items() if share > 0]
            if view == TOKENS and 0 in rows and trained:
                found[n]["separation"][criterion] = float(rows[0].mean() - np.mean(trained))
        found[n]["rates"] = _by_rate(by_share, n)
    return found


def _by_rate(by_share: Mapping[float, Sequence[Moment]], n: int) -> Found:
    """How well one number tells untrained from trained: the mean rate of a sample, and that less permuted labels'.

    ``auc`` is the probability that a sample of an untrained model has a higher number than one of a trained model of
    the same seed; ``threshold`` the one at which the shares of both that it calls right are largest in sum.
    """
    found: Found = {}
    untrained = {moment.seed: moment for moment in by_share.get(0, ())}
    for name, is_apart in ((RATE, False), (DISTANCE, True)):
        areas, first, second = [], [], []
        for moment in (m for share, moments in by_share.items() if share > 0 for m in moments):
            if moment.seed in untrained and (not is_apart or PERMUTED in views(moment)):
                high, low = _means(untrained[moment.seed], n, is_apart), _means(moment, n, is_apart)
                if not len(high):
                    continue
                areas.append((moment.seed, float((high[:, None] > low).mean() + (high[:, None] == low).mean() / 2)))
                first.append(high)
                second.append(low)
        if areas:
            seeds = sorted({seed for seed, _ in areas})
            each = [float(np.mean([area for s, area in areas if s == seed])) for seed in seeds]
            threshold, right = _best(np.concatenate(first), np.concatenate(second))
            found[name] = {"auc": over_seeds(each, 0, 1), "threshold": threshold, "right": right}
    return found


def _means(moment: Moment, n: int, is_apart: bool) -> np.ndarray:
    """(m,): mean over both spaces of the rate of all blocks and pairs."""
    mean = moment.default_tally(BLOCKS).total().sample_rates(n)
    if is_apart:
        other = moment.default_tally(BLOCKS, PERMUTED).total().sample_rates(n)
        mean = mean[: len(other)] - other
    return mean.mean((1, 2, 3))


def _best(high: np.ndarray, low: np.ndarray) -> tuple[float, float]:
    """The threshold that best parts the two, and the mean of the shares on their right side of it."""
    values = np.unique(np.concatenate([high, low]))
    between = (values[:-1] + values[1:]) / 2 if len(values) > 1 else values
    right = [((high > t).mean() + (low <= t).mean()) / 2 for t in between]
    best = int(np.argmax(right))
    return float(between[best]), float(right[best])
