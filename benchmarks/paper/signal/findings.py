"""All numbers of a setting's report."""

import math
from typing import Any

from ..report.folder import number
from . import rates, reproducibility
from .folder import Setting
from .tallies import BLOCKS, Moment, default_ratio, moment_of
from .warning import warning

DIGITS = 6
NEAR = 0.25
"""The share of the training that is shown where one has to stand for all."""
Found = dict[str, Any]


def findings(setting: Setting) -> Found:
    """Read every measurement that is there and answer what can be answered by them."""
    by_share, like = _moments(setting)
    blocks, pairs, sample = len(like.blocks), len(like.pairs), like.sample
    content, shares = setting.content, list(by_share)
    found: Found = {
        **{key: content[key] for key in ("title", "data", "settings", "facts", "seeds", "shares")},
        "tasks": list(like.tasks),
        "blocks": list(like.blocks),
        "ratios": list(like.ratios),
        "default_ratio": like.ratios[default_ratio(like.ratios)],
        "images": next(iter(by_share.values()))[0].tally(BLOCKS).units,
        "batch": like.batch,
        "sample": sample,
        "missing": [f"seed {seed}, {100 * share:g} %" for seed, share in setting.missing],
        "measured": {f"{share:g}": [moment.seed for moment in by_share[share]] for share in shares},
        "digests": {f"{m.seed}.{m.share:g}": m.digest for moments in by_share.values() for m in moments},
        "cpu_seconds": setting.cpu_seconds,
        "seconds": _seconds(content.get("seconds")),
        "near": f"{min(shares, key=lambda share: abs(share - NEAR)):g}",
        "random": reproducibility.random_plans(blocks, pairs),
        "by_share": {},
    }
    for share, moments in by_share.items():
        found["by_share"][f"{share:g}"] = {
            "rates": rates.rates(moments),
            "rules": rates.rules(moments),
            "averaging": rates.averaging(moments),
            "samples": reproducibility.between_samples(moments, sample),
            "own_space": reproducibility.own_space(moments, sample),
            "seeds": reproducibility.between_seeds(moments),
            "by_ratio": rates.by_ratio(moments, like.ratios),
            "variance": reproducibility.variance(moments, blocks),
            "profiles": reproducibility.profiles(moments),
        }
        of_blocks = found["by_share"][f"{share:g}"]["samples"][BLOCKS]
        found["by_share"][f"{share:g}"]["images_for_overlap"] = {
            space: reproducibility.images_for_overlap(by_size) for space, by_size in of_blocks.items()
        }
    near = by_share[float(found["near"])]
    return rounded({**found, "cells": rates.cells(near), "warning": warning(by_share)})


def _moments(setting: Setting) -> tuple[dict[float, list[Moment]], Any]:
    by_share: dict[float, list[Moment]] = {}
    first = None
    for seed, share in setting.files:
        found = setting.load(seed, share, first)
        first = first or found
        by_share.setdefault(share, []).append(moment_of(found))
    return {share: by_share[share] for share in sorted(by_share)}, first


def _seconds(by_seed: Any) -> dict[str, float]:
    """Of training and measuring, the mean over seeds."""
    rows = [row for row in (by_seed or {}).values() if isinstance(row, dict)]
    names = sorted({name for row in rows for name in row})
    return {name: sum(number(row.get(name)) for row in rows) / len(rows) for name in names}


def rounded(value: Any) -> Any:
    """The same with text for keys, lists for tuples and numbers of six digits; what is not known stays NaN."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") + 0.0 if math.isfinite(value) else value
    return value
