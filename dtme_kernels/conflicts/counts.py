"""What is kept of a conflict analysis: counts."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ConflictCounts:
    """Counts over tokens for every pair of tasks; ``a + b`` adds them.

    Counted at R ranks, the three have a leading axis, and ``counts[r]`` are the counts at one of them.

    Attributes:
        range: (K, K) int64, symmetric, zero diagonal: conflicts in the range space.
        null: the same in the null space.
        valid: the same of the tokens at which the pair was compared at all, the denominator.
        tokens: tokens seen.
        nonfinite_pairs: () int64, (token, pair)s left out for a NaN or Inf. ``nonfinite`` is the same as an int; it
            waits for the device.
    """

    range: Tensor
    null: Tensor
    valid: Tensor
    tokens: int
    nonfinite_pairs: Tensor | int = 0

    @property
    def nonfinite(self) -> int:
        """(token, pair)s left out because a gradient holds NaN or Inf."""
        return int(self.nonfinite_pairs)

    def rate(self, space: Literal["range", "null"]) -> float:
        """Conflicts over valid (token, pair)s, all pairs together; NaN where none is valid.

        Raises:
            ValueError: ``space`` is not ``"range"`` or ``"null"``; the counts are of several ranks.
        """
        if space not in ("range", "null"):
            raise ValueError(f"space must be 'range' or 'null', got {space!r}")
        if self.range.dim() > 2:
            raise ValueError(f"these are the counts at {len(self.range)} ranks: take one, counts[r].rate({space!r})")
        valid = int(self.valid.sum())
        return int(getattr(self, space).sum()) / valid if valid else float("nan")

    def __getitem__(self, r: int) -> "ConflictCounts":
        """The counts at the r-th rank. Raises TypeError where there is only one, IndexError past the last."""
        if self.range.dim() == 2:
            raise TypeError("these are the counts at one rank")
        return ConflictCounts(self.range[r], self.null[r], self.valid[r], self.tokens, self.nonfinite_pairs)

    def __add__(self, other: "ConflictCounts") -> "ConflictCounts":
        if not isinstance(other, ConflictCounts):
            return NotImplemented
        if other.range.shape != self.range.shape:
            ours, theirs = (
                f"{x.range.shape[-1]}" + f" tasks at {len(x.range)} ranks" * (x.range.dim() > 2) for x in (self, other)
            )
            raise ValueError(f"cannot add counts of {ours} and of {theirs} tasks")
        return ConflictCounts(
            self.range + other.range,
            self.null + other.null,
            self.valid + other.valid,
            self.tokens + other.tokens,
            self.nonfinite_pairs + other.nonfinite_pairs,
        )
