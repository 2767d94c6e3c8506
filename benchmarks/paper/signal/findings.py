"""All numbers of a setting's report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..report.text import without_place
from . import rates, reproducibility
from .folder import Setting
from .measurement import PERMUTED, Measurement
from .tallies import AT_MOST, BLOCKS, Moment, default_ratio, moment_of
from .warning import warning

DIGITS = 6
NEAR = 0.25
"""The share of the training that is shown where one has to stand for all."""
Found = dict[str, Any]


def findings(setting: Setting, at: float = NEAR) -> Found:
    """Read every measurement that is there and answer what can be answered by them.

    Args:
        at: the share of the training whose details are reported, or the measured one that is nearest.
    """
    by_share, like = _moments(setting)
    near = min(by_share, key=lambda share: abs(share - at))
    found = {
        **_facts(setting, by_share, like),
        "near": f"{near:g}",
        "random": reproducibility.random_plans(len(like.blocks), len(like.pairs)),
        "by_share": {f"{share:g}": _of_share(moments, like) for share, moments in by_share.items()},
        "details": _details(by_share[near], like),
        "warning": warning(by_share),
    }
    return rounded(found)


def _facts(setting: Setting, by_share: Mapping[float, Sequence[Moment]], like: Measurement) -> Found:
    moments = [moment for group in by_share.values() for moment in group]
    return {
        **{key: setting.content[key] for key in ("title", "data", "facts", "seeds", "shares")},
        "settings": without_place(setting.content["settings"]),
        "tasks": like.tasks,
        "blocks": like.blocks,
        "ratios": like.ratios,
        "default_ratio": like.ratios[default_ratio(like.ratios)],
        "images": moments[0].tally(BLOCKS).units,
        "batch": like.batch,
        "sample": like.sample,
        "permuted": _permuted(moments[0]),
        "missing": [f"seed {seed} at {100 * share:g} %" for seed, share in setting.missing],
        "digests": {f"{moment.seed}.{moment.share:g}": moment.digest for moment in moments},
        "cpu_seconds": setting.cpu_seconds,
        "seconds": _seconds([*setting.seconds.values()]),
    }


def _of_share(moments: Sequence[Moment], like: Measurement) -> Found:
    """What is reported of every share of the training."""
    samples = reproducibility.between_samples(moments, like.sample)
    return {
        "rates": rates.rates(moments),
        "rules": rates.rules(moments),
        "samples": samples,
        "images_for_overlap": {
            space: reproducibility.images_for_overlap(by_size, like.sample)
            for space, by_size in samples[BLOCKS].items()
        },
        "seeds": reproducibility.between_seeds(moments),
        "variance": reproducibility.variance(moments, len(like.blocks)),
        "profiles": reproducibility.profiles(moments),
        "label_gains": rates.label_gains(moments, like.tasks),
    }


def _details(moments: Sequence[Moment], like: Measurement) -> Found:
    """What is reported of one share only."""
    return {
        "items": rates.items(moments),
        "cells": rates.cells(moments),
        "averaging": rates.averaging(moments),
        "own_space": reproducibility.own_space(moments, like.sample),
        "by_ratio": rates.by_ratio(moments, like.ratios),
    }


def _moments(setting: Setting) -> tuple[dict[float, list[Moment]], Measurement]:
    """Share -> its moments, by seed, and the measurement that was read first."""
    by_share: dict[float, list[Moment]] = {}
    first = setting.load(*next(iter(setting.files)))
    for seed, share in setting.files:
        heads = setting.heads(seed, share, first)
        moment = moment_of(setting.load(seed, share, first), None if heads is None else heads.losses)
        by_share.setdefault(share, []).append(moment)
    return {share: by_share[share] for share in sorted(by_share)}, first


def _permuted(moment: Moment) -> int:
    """Images that were also read with permuted labels."""
    return moment.tally(BLOCKS, PERMUTED).units if (PERMUTED, AT_MOST) in moment.tallies else 0


def _seconds(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Wall time of training and measuring, the mean over seeds."""
    names = sorted({name for row in rows for name in row if name != "cpu"})
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def rounded(value: Any) -> Any:
    """The same with text for keys, lists for tuples and numbers of six digits; what is not known stays NaN."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") + 0.0 if math.isfinite(value) else value
    return value
