"""Folders of conflict measurements with effects that are known."""

import json

import numpy as np

from benchmarks.paper.signal.folder import file_name
from benchmarks.paper.signal.measurement import (
    OVER_IMAGES,
    OVER_TOKENS,
    OWN_SPACE,
    PERMUTED,
    TOKENS,
    Counts,
    Measurement,
)

TASKS = ("semseg", "depth", "normals", "edge")


def counts(rng, rates, units, tokens, zero=0.01, absent=0):
    """Counts of ``units`` units of ``tokens`` tokens; ``rates`` (U, D, P, R, 2) or what broadcasts to it."""
    rates = np.clip(np.broadcast_to(rates, (units, *np.shape(rates)[1:])), 0.001, 0.999)
    valid = np.full(rates.shape[:3], tokens - absent, dtype=np.uint16)
    hits = rng.binomial(tokens - absent, rates).astype(np.uint16)
    zeros = rng.binomial(hits, zero).astype(np.uint16)
    return Counts(hits - zeros, zeros, valid, np.full(valid.shape, absent, dtype=np.uint16))


def measurement(
    seed=0,
    share=0.25,
    units=256,
    blocks=6,
    tasks=TASKS,
    ratios=(1.0, 10.0, 100.0, 500.0, 1000.0),
    sample=64,
    batch=16,
    tokens=64,
    rate=0.45,
    block=(),
    pair=(),
    own=None,
    between_images=0.1,
    permuted=0.5,
    rng=None,
):
    """One model: every cell's rate is ``rate`` plus its block's, its pair's and its own effect, and the image's.

    ``between_images`` is the standard deviation of what an image adds to a cell. Half of the images are read with
    permuted labels.
    """
    rng = rng or np.random.default_rng([seed, round(1000 * share)])
    pairs = len(tasks) * (len(tasks) - 1) // 2
    base = np.full((blocks, pairs), rate)
    base += np.asarray(block or np.zeros(blocks))[:, None] + np.asarray(pair or np.zeros(pairs))
    base = base if own is None else base + own
    base = base[None, :, :, None, None]
    wide = (len(ratios), 2)

    def images(center, n, sd):
        return np.broadcast_to(center, (n, blocks, pairs, *wide)) + rng.normal(0, sd, (n, blocks, pairs, 1, 2))

    views = {
        TOKENS: counts(rng, images(base, units, between_images), units, tokens),
        OVER_TOKENS: counts(rng, images(base, units, 0.0), units, 1),
        OVER_IMAGES: counts(rng, images(base, units // batch, between_images / 4), units // batch, tokens),
        PERMUTED: counts(rng, images(np.full_like(base, permuted), units // 2, between_images), units // 2, tokens),
    }
    shifted = [np.repeat(rng.normal(0, 0.01, (units // sample, blocks, 1, 1, 2)), sample, axis=0)]
    views[OWN_SPACE] = counts(rng, images(base, units, between_images) + shifted[0], units, tokens)
    ranks = np.array([[max(1, round(r**0.6 * (d + 1))) for d in range(blocks)] for r in ratios])
    sample_ranks = np.maximum(1, ranks + rng.integers(-2, 3, (units // sample, *ranks.shape)))
    names = tuple(f"layer.{d}" for d in range(blocks))
    return Measurement(seed, share, tuple(tasks), names, tuple(ratios), batch, sample, ranks, sample_ranks, views)


def write_folder(path, measurements, seeds=None, shares=None, title="a small ViT on rooms"):
    """``experiment.json`` and the measurements."""
    (path / "measured").mkdir(parents=True)
    content = {
        "format": 1,
        "experiment": "signal",
        "data": "rooms",
        "settings": {"steps": 100},
        "title": title,
        "seeds": seeds or sorted({m.seed for m in measurements}),
        "shares": shares or sorted({m.share for m in measurements}),
        "facts": {"device": "cpu"},
        "seconds": {f"seed-{m.seed}": {"training": 10.0, "measuring": 20.0, "cpu": 30.0} for m in measurements},
    }
    (path / "experiment.json").write_text(json.dumps(content))
    for m in measurements:
        m.save(path / "measured" / file_name(m.seed, m.share))
    return path
