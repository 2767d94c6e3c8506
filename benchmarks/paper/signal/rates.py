"""How high the rates are, what the rule of counting and averaging before the sign change, and what the ratio does."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtme.heads import label_gain

from ...ranks import spearman
from .measurement import OVER_IMAGES, OVER_TOKENS, PERMUTED, SPACES, TOKENS
from .reproducibility import AT_IMAGES
from .statistics import (
    Interval,
    agreement,
    chosen,
    clipped,
    over_pairs,
    over_seeds,
    quota,
    reliability,
)
from .tallies import AT_MOST, BELOW, BLOCKS, CELLS, LETTER, PAIRS, Moment, Tally, intervals

Found = dict[str, Any]


def mean_of(tallies: Sequence[Tally], minus: Sequence[Tally] = ()) -> np.ndarray:
    """(X, R, 2, 3): the mean over models with its interval over images, the models given."""
    share = 1 / len(tallies)
    return intervals([*((share, tally) for tally in tallies), *((-share, tally) for tally in minus)])


def rates(moments: Sequence[Moment]) -> Found:
    """Rates of all, by block and by pair, at one share of the training, against labels of other images."""
    found: Found = {"seeds": [moment.seed for moment in moments], "all": {}}
    for kind in (BLOCKS, PAIRS):
        own = mean_of([moment.default_tally(kind) for moment in moments])
        found[kind] = {name: own[:, 0, space].tolist() for space, name in enumerate(SPACES)}
    real = [moment.default_tally(BLOCKS).total() for moment in moments]
    other = (
        [moment.default_tally(BLOCKS, PERMUTED).total() for moment in moments] if has_view(moments, PERMUTED) else []
    )
    own = mean_of(real)[0, 0]
    for space, name in enumerate(SPACES):
        by_seed = [float(tally.rates[0, 0, space]) for tally in real]
        found["all"][name] = {
            "rate": own[space].tolist(),
            "by_seed": by_seed,
        }
        if other:
            found["all"][name]["permuted"] = mean_of(other)[0, 0, space].tolist()
            found["all"][name]["difference"] = mean_of(real, other)[0, 0, space].tolist()
            apart = [
                float((mine.first(one.units).rates - one.rates)[0, 0, space])
                for mine, one in zip(real, other, strict=True)
            ]
            found["all"][name]["difference_by_seed"] = apart
            found["all"][name]["difference_over_seeds"] = over_seeds(apart)
    return found


def items(moments: Sequence[Moment]) -> Found:
    """Rates by block and by pair at every ratio, and how far they are from those with labels of other images."""
    found: Found = {}
    for kind in (BLOCKS, PAIRS):
        by_ratio = np.mean([moment.tally(kind).rates for moment in moments], axis=0)
        found[kind] = {name: {"by_ratio": by_ratio[:, :, space].tolist()} for space, name in enumerate(SPACES)}
        if has_view(moments, PERMUTED):
            real, other = ([moment.default_tally(kind, view) for moment in moments] for view in (TOKENS, PERMUTED))
            apart = mean_of(real, other)
            for space, name in enumerate(SPACES):
                found[kind][name]["difference"] = apart[:, 0, space].tolist()
    return found


def has_view(moments: Sequence[Moment], view: str) -> bool:
    return all((view, AT_MOST) in moment.tallies for moment in moments)


def cells(moments: Sequence[Moment]) -> Found:
    """(D, P) rates of pairs in blocks, the mean over models."""
    shape = [moments[0].tally(kind).valid.shape[1] for kind in (BLOCKS, PAIRS)]
    mean = np.mean([moment.default_tally(CELLS).rates[:, 0] for moment in moments], axis=0)
    return {name: mean[:, space].reshape(shape).tolist() for space, name in enumerate(SPACES)}


def rules(moments: Sequence[Moment]) -> Found:
    """How far other rules of counting move the rate of all, and the plan of the same images."""
    found: Found = {}
    for rule in (BELOW, LETTER):
        found[rule] = {}
        for space, name in enumerate(SPACES):
            moved, overlap = [], []
            for moment in moments:
                own, other = (moment.default_tally(BLOCKS, TOKENS, which) for which in (AT_MOST, rule))
                moved.append(float((other.total().rates - own.total().rates)[0, 0, space]))
                overlap.append(_overlap(own.rates[:, 0, space], other.rates[:, 0, space]))
            found[rule][name] = {"difference": over_seeds(moved), "overlap": over_seeds(overlap, 0, 1)}
    return found


def averaging(moments: Sequence[Moment]) -> Found:
    """Does averaging before the sign sharpen what distinguishes blocks and pairs?

    The sharpness is the spread of the rates between items over the spread that the noise of the images alone gives.
    """
    found: Found = {}
    for view in (TOKENS, OVER_TOKENS, OVER_IMAGES):
        if not has_view(moments, view):
            continue
        found[view] = {"units": moments[0].tally(BLOCKS, view).units}
        for kind in (BLOCKS, PAIRS):
            found[view][kind] = {}
            for space, name in enumerate(SPACES):
                tallies = [moment.default_tally(kind, view) for moment in moments]
                like = [
                    spearman(tally.rates[:, 0, space], moment.default_tally(kind).rates[:, 0, space])
                    for tally, moment in zip(tallies, moments, strict=True)
                ]
                of_all = [float(tally.total().rates[0, 0, space]) for tally in tallies]
                found[view][kind][name] = {
                    "rate": over_seeds(of_all),
                    "sharpness": reliability(tallies, space).sharpness(tallies[0].units),
                    "correlation": over_seeds(like, -1, 1),
                }
    return found


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float((chosen(first) & chosen(second)).sum()) / quota(len(first))


def by_ratio(moments: Sequence[Moment], ratios: Sequence[float]) -> Found:
    """Ranks and how far they move between samples, and what plans and profiles of blocks at other ratios are worth."""
    found: Found = {}
    every = mean_of([moment.tally(BLOCKS).total() for moment in moments])[0]
    for r, ratio in enumerate(ratios):
        row: Found = {"rank": np.mean([moment.ranks[r] for moment in moments], axis=0).tolist()}
        row |= _moves(moments, r)
        for space, name in enumerate(SPACES):
            blocks = [moment.tally(BLOCKS) for moment in moments]
            row[name] = {
                "rate": every[r, space].tolist(),
                "overlap": over_seeds(
                    [
                        _overlap(tally.rates[:, r, space], tally.rates[:, moment.default, space])
                        for tally, moment in zip(blocks, moments, strict=True)
                    ],
                    0,
                    1,
                ),
                "halves": _halves(blocks, r, space),
                "reliability": reliability(blocks, space, r).at(AT_IMAGES),
                "seeds": _between(blocks, r, space),
            }
        found[f"{ratio:g}"] = row
    return found


def _moves(moments: Sequence[Moment], r: int) -> Found:
    """Of the ranks of samples, by block: their standard deviation over their mean, and largest over smallest."""
    spreads, factors = [], []
    for moment in moments:
        ranks = moment.sample_ranks[:, r].astype(np.float64)
        if len(ranks) > 1:
            spreads.append(ranks.std(0, ddof=1) / ranks.mean(0))
            factors.append(ranks.max(0) / np.maximum(ranks.min(0), 1))
    if not spreads:
        return {"samples": 0}
    return {
        "samples": len(moments[0].sample_ranks),
        "spread": over_seeds([float(spread.mean()) for spread in spreads]),
        "largest_factor": float(np.max(factors)),
    }


def _halves(tallies: Sequence[Tally], r: int, space: int) -> Interval:
    """Rank correlation between the two halves of the images."""
    values = []
    for tally in tallies:
        samples = tally.sample_rates(tally.units // 2)[:, :, r, space]
        values.append(spearman(samples[0], samples[1]))
    return over_seeds(values, -1, 1)


def _between(tallies: Sequence[Tally], r: int, space: int) -> Interval | None:
    """Rank correlation between models."""
    if len(tallies) < 2:
        return None
    rates_of = np.stack([tally.rates[:, r, space] for tally in tallies])
    return clipped(over_pairs([agreement(rates_of).correlation]), -1, 1)


def label_gains(moments: Sequence[Moment], tasks: Sequence[str]) -> Found:
    """Task -> the mean over models of the share by which its loss is lower with the images' own labels."""
    there = [moment.heads for moment in moments if moment.heads is not None]
    gains = [[label_gain(losses[:, k])[0] for losses in there] for k in range(len(tasks))]
    return {task: over_seeds(of_task) for task, of_task in zip(tasks, gains, strict=True)} if there else {}
