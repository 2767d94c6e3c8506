"""From the sums of all ranks to a report."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..report import ConflictReport, stack_if_equal
from ..units import Split
from .gains import Gains, estimate
from .gradients import nothing_shared
from .heads import HeadLosses
from .spaces import Space
from .tally import Tally, matrices, units


class Sums:
    """What one process adds up in the second pass."""

    def __init__(self, tasks: Sequence[str], widths: Sequence[int], num_ratios: int) -> None:
        self.tasks = tuple(tasks)
        self.tally = Tally(len(widths), len(tasks), num_ratios)
        self.gains = Gains(widths, len(tasks))
        self.heads = HeadLosses(len(tasks))
        self.reached = torch.zeros(len(widths), len(tasks), dtype=torch.bool)
        self.alive = torch.zeros(len(tasks), dtype=torch.bool)
        """Tasks that had a gradient that is not zero."""
        self.drawn, self.skipped = dict.fromkeys(self.tasks, 0), dict.fromkeys(self.tasks, 0)
        """Batches in which a task was to be looked at, and those of them in which it had no loss."""
        self.num_batches = 0

    def state(self) -> dict[str, Any]:
        return {
            "tally": self.tally.bundles.state(),
            "gains": self.gains.bundles.state(),
            "heads": self.heads.rows,
            "reached": self.reached,
            "alive": self.alive,
            "drawn": self.drawn,
            "skipped": self.skipped,
            "num_batches": self.num_batches,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.tally.bundles.load(state["tally"])
        self.gains.bundles.load(state["gains"])
        self.heads.rows = list(state.get("heads", []))
        self.reached, self.alive = state["reached"], state["alive"]
        self.drawn, self.skipped = dict(state["drawn"]), dict(state["skipped"])
        self.num_batches = state["num_batches"]

    def in_order(self, tasks: Sequence[str]) -> "Sums":
        """The same with the tasks in another order; itself where they are in it already."""
        if self.tasks == tuple(tasks):
            return self
        index = [self.tasks.index(task) for task in tasks]
        other = Sums(tasks, self.gains.widths, self.tally.num_ratios)
        other.load(self.state())
        i, j = other.tally.pairs
        other.tally.bundles.sums = [
            matrices(counts, len(tasks))[..., index, :][..., index][..., i, j] for counts in self.tally.bundles.sums
        ]
        other.gains.bundles.sums = [rows[index] for rows in self.gains.bundles.sums]
        other.heads.rows = [rows[index] for rows in self.heads.rows]
        other.reached, other.alive = self.reached[:, index], self.alive[index]
        return other


def report_of(
    parts: Sequence[Sums | None],
    spaces: Mapping[str, Space],
    ratios: Sequence[float],
    num_samples: int,
    problems: Mapping[str, str],
    is_last: bool,
) -> ConflictReport:
    """The report of what all ranks have read.

    Args:
        parts: of every rank; None where it read nothing.
        problems: of each task that was left out of a batch, why.
        is_last: nothing more will be read: what was never seen is an error.

    Raises:
        ValueError: ranks name different tasks; a task without a gradient anywhere; no block that two tasks reach.
    """
    if (first := parts[0]) is None or None in parts:
        raise ValueError("loader yielded no batch in the second pass: it must be possible to iterate it twice")
    for rank, part in enumerate(parts):
        if set(part.tasks) != set(first.tasks):  # type: ignore[union-attr]
            raise ValueError(
                f"all ranks must name the same tasks: rank 0 has {list(first.tasks)}, rank {rank} {list(part.tasks)}"  # type: ignore[union-attr]
            )
    sums = [part.in_order(first.tasks) for part in parts]  # type: ignore[union-attr]
    reached = torch.stack([part.reached for part in sums]).any(0)
    shape = first.tally.shape
    rows = [row for part in sums for row in part.tally.bundles.sums]
    batches = [count for part in sums for count in part.tally.bundles.batches]
    if is_last:
        _check(sums, spaces, reached, rows, problems)
    splits = []
    for r in range(len(ratios)):
        of_ratio = units(rows, batches, shape, r)
        range_, null, valid = (matrices(x.sum(0), len(first.tasks)) for x in of_ratio[:3])
        splits.append((torch.tensor([space.ranks[r] for space in spaces.values()]), range_, null, valid, of_ratio))
    gains, resamples = estimate([row for part in sums for row in part.gains.bundles.sums], first.gains.widths)
    heads = [row for part in sums for row in part.heads.rows]
    ranks, range_, null, valid, of_first = splits[0]
    return ConflictReport(
        tasks=first.tasks,
        blocks=tuple(spaces),
        ranks=ranks,
        range_counts=range_,
        null_counts=null,
        valid_counts=valid,
        eigenvalues=stack_if_equal([space.eigenvalues.double().cpu() for space in spaces.values()]),
        num_samples=num_samples,
        ratio=float(ratios[0]),
        units=of_first,
        num_batches=sum(part.num_batches for part in sums),
        skipped={task: sum(part.skipped[task] for part in sums) for task in first.tasks},
        reached=reached,
        gains=gains,
        gain_resamples=resamples,
        head_losses=torch.stack(heads) if heads else None,
        bases=tuple(space.basis.cpu() for space in spaces.values()),
        alternatives={
            float(ratio): Split(ranks, range_, null, of_ratio.range, of_ratio.null)
            for ratio, (ranks, range_, null, _, of_ratio) in list(zip(ratios, splits, strict=True))[1:]
        },
    )


def _check(
    sums: Sequence[Sums],
    spaces: Mapping[str, Space],
    reached: Tensor,
    rows: Sequence[Tensor],
    problems: Mapping[str, str],
) -> None:
    tasks, alive = sums[0].tasks, torch.stack([part.alive for part in sums]).any(0)
    for i, task in enumerate(tasks):
        if not any(part.drawn[task] for part in sums):
            raise ValueError(
                f"task {task!r} was never among the tasks drawn: read more batches than "
                f"{sum(part.num_batches for part in sums)}, or more tasks in each by max_tasks"
            )
        if not alive[i]:
            hint = problems.get(task, "are all its labels ignored, or did step return numbers?")
            raise ValueError(f"task {task!r} has no gradient anywhere: {hint}")
    if not any(bool(row[-1].any()) for row in rows):
        raise ValueError(nothing_shared(list(spaces), tasks, reached))
