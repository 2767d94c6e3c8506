"""Conflict counts of the batches of an analysis one by one, or of bundles of them: what its intervals come from."""

from typing import NamedTuple

from torch import Tensor


class Units(NamedTuple):
    """Counts of n units, each some batches that were read one after the other, for D blocks and P pairs of tasks.

    Pairs are in the order of ``itertools.combinations(range(K), 2)``. Summed over the units they are the counts of the
    report. Tokens of an image are not independent, batches are: so these are what is resampled.
    """

    range: Tensor
    """(n, D, P) int64."""
    null: Tensor
    """(n, D, P) int64."""
    valid: Tensor
    """(n, D, P) int64."""
    batches: Tensor
    """(n,) int64: how many batches each unit holds."""


class Split(NamedTuple):
    """What depends on the ratio: the counts of the same gradients in the same basis, split at other ranks."""

    ranks: Tensor
    """(D,) int64."""
    range_counts: Tensor
    """(D, K, K) int64."""
    null_counts: Tensor
    """(D, K, K) int64."""
    range_units: Tensor | None = None
    """(n, D, P) int64; None where the analysis kept no units."""
    null_units: Tensor | None = None
    """(n, D, P) int64; None where the analysis kept no units."""
