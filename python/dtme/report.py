"""What the analysis found: conflict counts per block, how sure they are, and the plan that comes of them."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import write_beside
from .grouping import groups_of
from .heads import label_gains
from .pickles import Stamped
from .plan import ExpansionPlan
from .report_files import check_units, load_report, save_report
from .report_files import stack_if_equal as stack_if_equal  # of what a report holds
from .resampling import LEVEL, MIN_UNITS, rate_intervals
from .selection import Candidates, Rules
from .stability import stability
from .tables import block_table, summary
from .units import Split, Units

SPACES = ("range", "null")


@dataclass(frozen=True, eq=False)
class ConflictReport(Stamped):
    """Gradient conflicts of every block, in the range and in the null space of its tokens.

    Attributes:
        tasks: K names.
        blocks: D block names, in forward order.
        ranks: (D,) int64, dimension m of the range space.
        range_counts, null_counts, valid_counts: (D, K, K) int64, symmetric, zero diagonal: (token, pair)s that
            conflict, and those that could. A block where no pair could is one that fewer than two tasks reach, such as
            one of a task's own decoder, or where they never had gradients at the same token: it has no rates, and no
            plan is made for it.
        eigenvalues: (D, p) float64, descending, of the uncentred second moment; a list of (p_d,) where widths differ.
        num_samples: images of the covariance pass.
        ratio: the r that split range from null.
        units: the counts batch by batch, which intervals and stability come from; None: these are NaN.
        num_batches: batches of the second pass; 0 where that is not known.
        skipped: ``{task: batches}`` in which the task had no target, or none but ignored labels.
        settled: whether the analysis ended because its plan was settled; None where it was not asked to. It says
            nothing of the token space, which is that of all that the first pass read.
        reached: (D, K) bool: which task reaches which block; None: all of them all blocks.
        gains: (D,) float64: by how much more the losses fall, to first order, if every task has an affine map of its
            own in the block instead of all tasks sharing one; NaN where that is not known.
        gain_resamples: (R, D) float64: the gains of resamples of bundles of batches. Bundles can be fewer and larger
            than ``units``; where there are as many, these are the first R of the resamples of the units.
        head_losses: (n, K, 2) float64: every task's loss in each of the first batches, with the images' own labels and
            with those of other images; NaN where a task had none, or the others' labels are no others. None: not known,
            as of ``step`` functions, of batches of one image, and of labels that are not tensors with a row an image.
        bases: for each block its (p, p) eigenvectors as columns; None after loading a file that was saved without.
        alternatives: ``{ratio: Split}``, the same analysis at other ratios; ``at`` gives their reports.
        plan_options: of the plan that was to settle: the table and the picture are about that plan.
    """

    tasks: tuple[str, ...]
    blocks: tuple[str, ...]
    ranks: Tensor
    range_counts: Tensor
    null_counts: Tensor
    valid_counts: Tensor
    eigenvalues: Tensor | list[Tensor]
    num_samples: int
    ratio: float = field(default=100.0)
    units: Units | None = field(default=None, repr=False)
    num_batches: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    settled: bool | None = None
    reached: Tensor | None = None
    gains: Tensor = None  # type: ignore[assignment]  # NaNs are filled in below
    gain_resamples: Tensor | None = field(default=None, repr=False)
    head_losses: Tensor | None = field(default=None, repr=False)
    bases: tuple[Tensor, ...] | None = field(default=None, repr=False)
    alternatives: Mapping[float, Split] = field(default_factory=dict, repr=False)
    plan_options: Mapping[str, Any] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if self.gains is None:
            object.__setattr__(self, "gains", torch.full((len(self.blocks),), math.nan, dtype=torch.float64))
        check_units(self)

    @property
    def range_rates(self) -> Tensor:
        """(D,) float64: Σ_{i<j} range counts / Σ_{i<j} valid; NaN where nothing is valid."""
        return self._rates("range")

    @property
    def null_rates(self) -> Tensor:
        """(D,) float64, as ``range_rates``."""
        return self._rates("null")

    @property
    def num_features(self) -> dict[str, int]:
        """Width p of every block."""
        return {block: len(values) for block, values in zip(self.blocks, self.eigenvalues, strict=True)}

    @property
    def shared_blocks(self) -> tuple[str, ...]:
        """The blocks that at least two tasks reach, in forward order: those that a plan is about."""
        return tuple(self.blocks[d] for d in self._shared())

    @property
    def ratios(self) -> tuple[float, ...]:
        """Every ratio at which tokens were split, ``ratio`` first."""
        return (self.ratio, *(ratio for ratio in self.alternatives if ratio != self.ratio))

    def at(self, ratio: float) -> "ConflictReport":
        """The report at another of ``ratios``: the same gradients in the same basis, split at other ranks."""
        if isinstance(ratio, Real) and ratio == self.ratio:
            return self
        if isinstance(ratio, bool) or not isinstance(ratio, Real) or ratio not in self.alternatives:
            raise ValueError(f"this report has the ratios {[*map(float, self.ratios)]}, got {ratio!r}")
        units, split = self.units, self.alternatives[ratio]
        this = Split(self.ranks, self.range_counts, self.null_counts)
        if units is not None:
            this = this._replace(range_units=units.range, null_units=units.null)
            if split.range_units is None or split.null_units is None:
                units = None
            else:
                units = units._replace(range=split.range_units, null=split.null_units)
        return replace(
            self,
            ratio=ratio,
            ranks=split.ranks,
            range_counts=split.range_counts,
            null_counts=split.null_counts,
            units=units,
            settled=None,
            alternatives={self.ratio: this} | {r: other for r, other in self.alternatives.items() if r != ratio},
        )

    def pair_rates(self, space: str) -> Tensor:
        """(D, K, K) float64: the rate of every pair of tasks, NaN where nothing is valid and on the diagonal.

        Args:
            space: ``"range"`` or ``"null"``.
        """
        return self.counts_of(space).double() / self.valid_counts.double()  # 0 / 0 is NaN

    def intervals(self, space: str, level: float = LEVEL) -> Tensor:
        """(D, 2) float64: where the rate of all data lies at confidence ``level``, by resampling batches.

        NaN for blocks where fewer than 8 batches (or bundles of them) had anything to count. Resamples differ by as
        much as batches do: where all of them have the same rate, such as exactly 0 or 1, the interval has no width,
        though more data could bring another rate.

        Args:
            space: ``"range"`` or ``"null"``.
            level: in (0, 1).
        """
        if isinstance(level, bool) or not isinstance(level, Real) or not 0 < level < 1:
            raise ValueError(f"level must be a number between 0 and 1, got {level!r}")
        self.counts_of(space)
        if self.units is None or len(self.units.batches) < MIN_UNITS:
            self._say_once(
                "intervals",
                f"there are intervals from {MIN_UNITS} batches on, and this report has "
                f"{'no batches kept' if self.units is None else len(self.units.batches)}: they are NaN",
            )
            return torch.full((len(self.blocks), 2), math.nan, dtype=torch.float64)
        counts, valid = self.units_of(space)
        return rate_intervals(counts.sum(2), valid.sum(2), float(level))

    def label_gains(self) -> dict[str, tuple[float, float]]:
        """How well each head knows which labels belong to which image: what it must have learnt before rates mean much.

        Returns:
            ``{task: (gain, half)}``. The gain is by what share the loss of an image's own labels is below the loss of
            another image's labels, about 0 for a head that has learnt nothing, in at most 32 batches of each process:
            a share of the latter, or of the former where that is further from 0, as a negative loss is. Its 95 %
            interval is gain ± half, from Student's t of the batches. NaN where that is not known.
        """
        return label_gains(self)

    def stability(self, **plan_options: Any) -> dict[str, Tensor]:
        """In which share of the resamples ``plan(**plan_options)`` chooses each block.

        Blocks that are equal in a resample are decided there as in ``plan``, by their place: of two that are equal in
        all of them, the one that is chosen has a share of 1, which then says nothing about their rates. A block is
        chosen where any task gets a module there.

        Returns:
            ``{"modulation": (D,), "expansion": (D,)}`` float64; NaN below 8 batches, or where a block that the plan is
            about has fewer with anything to count; with ``strategy="gain"`` also where the gains have no resamples.

        Raises:
            ValueError: ``plan(**plan_options)`` does.
        """
        return stability(self, plan_options)

    def groups(self, space: str = "range", max_groups: int | None = None) -> dict[str, tuple[str, ...]]:
        """Put tasks that hardly conflict into groups, which can share a stream and modules.

        Average-linkage clustering by the pairs' rates over the blocks that ``plan()`` touches, the closest first. Two
        clusters merge only if the whole 95 % interval of every pair across them lies below 0.5, which is chance; pairs
        that never met have none, nor has any below 8 batches, which a warning says.

        Args:
            space: ``"range"`` or ``"null"``.
            max_groups: then merge on, by lowest average rate, until there are at most so many.

        Returns:
            ``{group name: tasks}``, every task in one of them. A task alone keeps its name; others are called such as
            ``"depth+normals"`` or, where that is long, ``"depth+7more"``.
        """
        return groups_of(self, space, max_groups)

    def plan(
        self,
        *,
        modulation: float = 0.5,
        expansion: float = 0.5,
        strategy: str = "conflict",
        num_tokens: int | str = 6,
        pair_threshold: float | None = None,
        seed: int = 0,
        groups: Mapping[str, Sequence[str]] | bool | None = None,
        max_parameters: float | None = None,
        max_compute: float | None = None,
    ) -> ExpansionPlan:
        """Choose blocks by their conflict rates (Algorithm 1, Appendix B.3), of those that at least two tasks reach.

        Args:
            modulation: share of the blocks that get modulations, those with the highest range rate; 0 for none.
            expansion: share of the blocks that get task tokens, those with the highest null rate; 0 for none.
            strategy: ``"conflict"``, or its controls ``"reverse"`` (lowest rates), ``"random"`` and ``"swap"``
                (modulation by null, expansion by range), or ``"gain"`` (modulation by ``gains``; a block whose gain is
                negative gets none, even if that leaves fewer than the share), or ``"pairs"``: as many modules as
                ``"conflict"`` gives, but task by task, to those that are in the pairs with the highest rates, whatever
                the block: ``pair_threshold`` in all blocks, at the threshold that gives so many (of equals at the last
                place, the earlier block and task). A pair counts only where its tasks are in no group together, and a
                task that meets no other gets nothing. ``"first"`` and ``"last"`` look at no rates: that share of the
                blocks, from the first one on or up to the last one.
            num_tokens: task tokens per task and block, or ``"text"`` (6) or ``"params"`` (1), the paper's two figures.
            pair_threshold: give a module only to tasks in some pair whose rate in that block and space reaches this;
                None gives one to every task that reaches the block.
            seed: of ``"random"``, an integer.
            groups: ``{group name: tasks}`` that share modules and a stream, or True for those of ``groups()``. A group
                gets a module if any of its tasks does.
            max_parameters: of all plans with at most as many blocks as the shares say, that add at most so many
                parameters, the one with the highest sum of chosen rates. Under ``"reverse"`` the sum is of 1 - rate;
                under ``"gain"``, of gains and of null rates, each in parts of its own mean over the blocks; under
                ``"random"``, ``"first"`` and ``"last"`` blocks count by when they are taken.
            max_compute: likewise with ``ExpansionPlan.compute()`` at most so much. Of blocks with equal rates the later
                one is chosen, without ``max_compute`` the earlier.

        Raises:
            ValueError: an argument is out of range; gains that are asked for are not known; a budget is below every
                plan.
        """
        rules = Rules(
            modulation, expansion, strategy, num_tokens, pair_threshold, seed, groups, max_parameters, max_compute
        )
        return Candidates(self, rules).plan()

    def table(self, plan: ExpansionPlan | None = None) -> str:
        """One row per block: width, rank, both rates with their intervals and, given a plan, what it puts there."""
        return block_table(self, plan)

    def __str__(self) -> str:
        return summary(self)

    def plot(self, path: str | os.PathLike[str], plan: ExpansionPlan | None = None) -> None:
        """Draw both rates per block with their intervals, and mark where ``plan`` modulates and expands.

        Args:
            path: of a picture in a format that matplotlib writes.
            plan: None for ``self.plan(**self.plan_options)``, whose choices are marked with their stability.
        """
        from .plots import plot_report

        options = self.plan_options
        shares = self.stability(**options) if plan is None else None
        figure = plot_report(self, plan or self.plan(**options), shares)
        write_beside(Path(path), lambda beside: figure.savefig(beside, dpi=150))

    def save(self, path: str | os.PathLike[str], *, bases: bool = False) -> None:
        """Write JSON; floats survive exactly.

        Args:
            bases: also write the eigenvectors, in float32: they are most of the bytes, and ``conflict_map`` needs them.
        """
        save_report(self, path, bases)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ConflictReport":
        """Read what ``save`` wrote, also by earlier releases; ValueError names the file and what is wrong with it."""
        return load_report(cls, path)

    # --- for the modules beside this one ------------------------------------------------------------------------------

    def counts_of(self, space: str) -> Tensor:
        """(D, K, K) int64 of ``"range"`` or ``"null"``."""
        if space not in SPACES:
            raise ValueError(f"space must be one of {list(SPACES)}, got {space!r}")
        return self.range_counts if space == "range" else self.null_counts

    def units_of(self, space: str) -> tuple[Tensor, Tensor]:
        """(n, D, P) int64 each: what conflicted in ``space``, and what could."""
        assert self.units is not None
        return self.units.range if space == "range" else self.units.null, self.units.valid

    def _rates(self, space: str) -> Tensor:
        # both sums count every pair twice
        return self.counts_of(space).sum((1, 2)).double() / self.valid_counts.sum((1, 2)).double()

    def _shared(self) -> list[int]:
        return self.valid_counts.flatten(1).any(1).nonzero().flatten().tolist()

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(text, stacklevel=3)
