"""Would another sample, or another model, have given the same plan?"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .measurement import OWN_SPACE, SPACES, TOKENS
from .statistics import (
    FEWEST,
    Interval,
    agreement,
    cell_components,
    clipped,
    jackknife,
    over_pairs,
    over_seeds,
    quota,
    random_overlap,
    reliability,
    with_noise,
)
from .tallies import AT_MOST, BLOCKS, CELLS, KINDS, PAIRS, Moment, resampled

SIZES = (64, 256, 1024, 4096)
"""Images of a sample."""
AT_IMAGES = 256
"""Where one number has to stand for all."""
WANTED_OVERLAP, WANTED_RELIABILITY = 0.9, 0.8
LEAST = {"overlap": 0.0, "equal": 0.0, "correlation": -1.0}
MEASURES = {BLOCKS: tuple(LEAST), PAIRS: ("overlap", "correlation"), CELLS: ("correlation",)}
OWN = "own"
Found = dict[Any, Any]


def sizes(units: int, sample: int) -> list[int]:
    """Of disjoint samples: powers of 4 times 64, the size of samples with a token space of their own, and half."""
    return sorted({n for n in (*SIZES, sample, units // 2) if 8 <= n <= units // 2})


def between_samples(moments: Sequence[Moment], sample: int) -> Found:
    """Agreement of disjoint samples of one model, by kind of item, space and number of images.

    At the number of all images there is but one sample: pairs of bootstrap resamples stand for two. They vary around
    the measured rates, which differ from each other by more than the true ones do, so they agree a little too well.
    ``OWN`` is the agreement of samples that have a token space of their own, of ``sample`` images each.
    """
    units = moments[0].tally(BLOCKS).units
    found: Found = {}
    for kind in KINDS:
        resampled_rates = [_resamples(moment, kind) for moment in moments]
        found[kind] = {}
        for space, name in enumerate(SPACES):
            row: Found = {n: _samples(moments, kind, TOKENS, n, space) for n in sizes(units, sample)}
            pairs = [agreement(rates[..., space]) for rates in resampled_rates]
            row[units] = {
                what: over_seeds([_mean(getattr(one, what)) for one in pairs], LEAST[what], 1)
                for what in MEASURES[kind]
            }
            if _has_own_space(moments) and 2 * sample <= units:
                row[OWN] = _samples(moments, kind, OWN_SPACE, sample, space)
            found[kind][name] = row
    return found


def _has_own_space(moments: Sequence[Moment]) -> bool:
    return all((OWN_SPACE, AT_MOST) in moment.tallies for moment in moments)


def _samples(moments: Sequence[Moment], kind: str, view: str, n: int, space: int) -> dict[str, Interval]:
    each = [agreement(moment.default_tally(kind, view).sample_rates(n)[:, :, 0, space]) for moment in moments]
    return {what: clipped(over_pairs([getattr(one, what) for one in each]), LEAST[what], 1) for what in MEASURES[kind]}


def _resamples(moment: Moment, kind: str) -> np.ndarray:
    """(1000, X, 2) rates of resamples of all images."""
    value, around = resampled([(1.0, moment.default_tally(kind))])
    return (value + around)[:, :, 0]


def _mean(matrix: np.ndarray) -> float:
    m = len(matrix)
    return float(matrix.sum() - np.trace(matrix)) / (m * (m - 1))


def own_space(moments: Sequence[Moment], sample: int) -> Found:
    """What the token space of a sample of its own changes, against that of all images."""
    if not _has_own_space(moments) or moments[0].tally(BLOCKS).units < sample:
        return {}
    found: Found = {"images": sample}
    for space, name in enumerate(SPACES):
        moved, overlap = [], []
        for moment in moments:
            own, common = (
                moment.default_tally(BLOCKS, view).sample_rates(sample)[:, :, 0, space] for view in (OWN_SPACE, TOKENS)
            )
            moved.append(float(np.nanmean(np.abs(own - common))))
            pairs = [agreement(np.stack(both)).overlap[0, 1] for both in zip(own, common, strict=True)]
            overlap.append(float(np.mean(pairs)))
        found[name] = {"difference": over_seeds(moved), "same_plan": over_seeds(overlap, 0, 1)}
    return found


def between_seeds(moments: Sequence[Moment]) -> Found:
    """Agreement of models by all their images: mean over their pairs, with a jackknife from five on, and the range."""
    found: Found = {"models": len(moments)}
    if len(moments) < 2:
        return found
    upper = np.triu_indices(len(moments), 1)
    for kind in KINDS:
        found[kind] = {}
        for space, name in enumerate(SPACES):
            rates = np.stack([moment.default_tally(kind).rates[:, 0, space] for moment in moments])
            one = agreement(rates)
            found[kind][name] = {
                what: {
                    "mean": clipped(over_pairs([getattr(one, what)]), LEAST[what], 1),
                    "range": [float(f(getattr(one, what)[upper])) for f in (np.min, np.max)],
                }
                for what in MEASURES[kind]
            }
    return found


def random_plans(blocks: int, pairs: int) -> Found:
    items = {BLOCKS: blocks, PAIRS: pairs, CELLS: blocks * pairs}
    return {kind: {"of": n, "chosen": quota(n), **random_overlap(n, quota(n))._asdict()} for kind, n in items.items()}


def variance(moments: Sequence[Moment], blocks: int) -> Found:
    """Components of the variance of the rates by seed, block and pair; their intervals leave out each of five seeds."""
    found: Found = {}
    for space, name in enumerate(SPACES):
        of = with_noise([moment.default_tally(CELLS) for moment in moments], space)
        whole = cell_components(of, blocks)
        models = range(len(moments))
        outs = models if len(moments) >= FEWEST else ()
        left = [cell_components(of, blocks, [s for s in models if s != out]) for out in outs]
        shares, parts = whole.shares(AT_IMAGES), [one.shares(AT_IMAGES) for one in left]
        found[name] = {
            "variances": whole.variances,
            "noise_of_an_image": whole.noise,
            "shares": {
                effect: clipped(jackknife(share, [part[effect] for part in parts]), 0, 1)
                for effect, share in shares.items()
            },
            "sample": {n: whole.shares(n)["sample"] for n in SIZES},
        }
    return found


def profiles(moments: Sequence[Moment]) -> Found:
    """How reliable the order of blocks and that of pairs is, and how many images it needs."""
    found: Found = {}
    for kind in (BLOCKS, PAIRS):
        found[kind] = {}
        for space, name in enumerate(SPACES):
            one = reliability([moment.default_tally(kind) for moment in moments], space)
            units = moments[0].tally(kind).units
            found[kind][name] = {
                "spread": math.sqrt(max(0.0, one.profile.within)),
                "signal_per_image": one.signal,
                "within": {n: one.at(n) for n in sorted({AT_IMAGES, units})},
                "across": {n: one.across(n) for n in sorted({AT_IMAGES, units})},
                "images": one.images_for(WANTED_RELIABILITY),
            }
    return found


def images_for_overlap(by_size: dict[int | str, dict[str, Interval]], sample: int) -> Interval:
    """The least of the measured numbers of images from which on plans overlap enough; infinite where none does.

    The ends are where the ends of the overlap's interval reach it. Where samples with token spaces of their own were
    measured, which is what the product makes, they are what counts.
    """
    overlaps = {n: one["overlap"] for n, one in by_size.items() if isinstance(n, int)}
    if OWN in by_size:
        overlaps[sample] = by_size[OWN]["overlap"]

    def reached(end: int) -> float:
        enough = math.inf
        for n in sorted(overlaps, reverse=True):
            # a number without an interval does not settle where the interval's end is
            if not (overlaps[n][end] >= WANTED_OVERLAP or (math.isnan(overlaps[n][end]) and enough < math.inf)):
                break
            enough = n
        return enough

    if all(math.isnan(overlap.low) for overlap in overlaps.values()):
        return Interval(reached(0))
    return Interval(reached(0), reached(2), reached(1))
