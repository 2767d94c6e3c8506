"""Spearman's rank correlation."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata


def rank_correlations(values: ArrayLike) -> np.ndarray:
    """(m, m) from (m, X): the correlation of the ranks of every two rows; 0 where one of them is constant.

    Equal values share the mean of their ranks. Columns in which any row is NaN are left out.
    """
    rows = np.asarray(values, dtype=np.float64)
    ranks = rankdata(rows[:, np.isfinite(rows).all(0)], axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1, keepdims=True)
    ranks /= np.maximum(norms, 1e-12)
    return ranks @ ranks.T


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Of two rows; 0 where one of them is constant."""
    return float(rank_correlations([first, second])[0, 1])
