"""Which tasks can share one stream: those that hardly conflict with each other."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .resampling import CHANCE, LEVEL, MIN_UNITS, rate_intervals

if TYPE_CHECKING:
    from .report import ConflictReport

LONGEST_NAME = 24


def groups_of(report: "ConflictReport", space: str, max_groups: int | None) -> dict[str, tuple[str, ...]]:
    """{group name: tasks}; see ``ConflictReport.groups``."""
    if max_groups is not None and (isinstance(max_groups, bool) or not isinstance(max_groups, int) or max_groups < 1):
        raise ValueError(f"max_groups must be None or a positive integer, got {max_groups!r}")
    touched = {block: d for d, block in enumerate(report.blocks)}
    columns = [touched[block] for block in report.plan().blocks]
    rates, highest = _pairs(report, space, columns)
    if report.units is None or len(report.units.batches) < MIN_UNITS:
        warnings.warn(
            f"this report has fewer than {MIN_UNITS} batches, so no pair's rate has an interval: only max_groups can "
            "put tasks into a group",
            stacklevel=3,
        )
    clusters = _merge(rates, highest < CHANCE, max_groups)
    names = group_names([[report.tasks[k] for k in cluster] for cluster in clusters], report.tasks)
    return {name: tuple(report.tasks[k] for k in cluster) for name, cluster in zip(names, clusters, strict=True)}


def _pairs(report: "ConflictReport", space: str, columns: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(K, K) float64 each: every pair's rate over all of the blocks ``columns``, and the upper end of its interval."""
    num_tasks = len(report.tasks)
    counts, valid = report.counts_of(space)[columns].sum(0).double(), report.valid_counts[columns].sum(0).double()
    highest = torch.full((num_tasks, num_tasks), math.nan, dtype=torch.float64)
    if report.units is not None:
        units, possible = report.units_of(space)
        upper = rate_intervals(_over_blocks(units, columns), _over_blocks(possible, columns), LEVEL)[:, 1]
        first, second = torch.triu_indices(num_tasks, num_tasks, 1)
        highest[first, second] = highest[second, first] = upper
    return counts / valid, highest


def _over_blocks(units: Tensor, columns: Iterable[int]) -> Tensor:
    """(n, P): block by block, without a copy of the blocks."""
    total = torch.zeros(units.shape[0], units.shape[2], dtype=torch.int64)
    for d in columns:
        total += units[:, d]
    return total


def _merge(rates: Tensor, certain: Tensor, max_groups: int | None) -> list[list[int]]:
    """Average linkage, closest first: while all cross pairs are ``certain``, then down to ``max_groups``.

    A pair that never met counts for nothing in an average; two clusters none of whose pairs met are at chance.
    """
    clusters = [[k] for k in range(len(rates))]
    met = ~rates.isnan()
    total, number, may = rates.nan_to_num(0.0), met.double(), certain.clone()
    total.fill_diagonal_(0.0)
    while len(clusters) > 1:
        average = torch.where(number > 0, total / number, CHANCE)
        average.fill_diagonal_(math.inf)
        closest = torch.where(may, average, math.inf)
        if not closest.isfinite().any():
            if max_groups is None or len(clusters) <= max_groups:
                break
            closest = average
        a, b = divmod(int(closest.argmin()), len(clusters))  # the first of equals, so a < b
        clusters[a] = sorted(clusters[a] + clusters[b])
        del clusters[b]
        kept = [c for c in range(len(rates)) if c != b]
        for matrix in (total, number):
            matrix[a] += matrix[b]
            matrix[:, a] += matrix[:, b]
        may[a] &= may[b]
        may[:, a] &= may[:, b]
        rates, total, number, may = (matrix[kept][:, kept] for matrix in (rates, total, number, may))
    return sorted(clusters)


def group_names(groups: Sequence[Sequence[str]], tasks: Sequence[str]) -> list[str]:
    """Names that can name a parameter: a lone task's own, ``"a+b"``, or ``"a+7more"`` where that would be long."""
    names: list[str] = []
    for group in groups:
        if len(group) == 1:
            names.append(group[0])
            continue
        name = "_".join("+".join(group).split())
        if len(name) > LONGEST_NAME:
            name = "_".join(f"{group[0]}+{len(group) - 1}more".split())
        taken, wanted, number = {*tasks, *names}, name, 2
        while name in taken or hasattr(nn.ModuleDict, name):
            name, number = f"{wanted}_{number}", number + 1
        names.append(name)
    return names


def group_of_all(tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Groups of which one holds all tasks, under a name that none of them has."""
    name = "all"
    while name in tasks:
        name += "_tasks"
    return {name: tuple(tasks)}
