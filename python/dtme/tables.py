"""A conflict report in words: the table of its blocks, what its plan costs, and how far to trust it."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .heads import HEAD_BATCHES, LEARNT, label_gains, untrained
from .plan import ExpansionPlan
from .resampling import CHANCE, LEVEL, MIN_UNITS, informative_units
from .stability import MOST_TIMES, agreement, batches_to_settle, stability

if TYPE_CHECKING:
    from .report import ConflictReport

NOT_REACHED = "fewer than two tasks reach it"
NEVER_MET = "no two tasks have gradients at the same token"
MOST_NAMES = 4  # in a cell
PAIRS_RULE = 2
"""If pairs lie so many times as far apart as blocks, the choice of tasks says more than that of blocks."""
FAR = 16
"""So many times what was read is more than most will read for a plan."""


def summary(report: "ConflictReport") -> str:
    """What was read, the table with the default plan, what that costs, and what speaks against trusting it."""
    options = report.plan_options
    plan, tasks = report.plan(**options), _listed(report.tasks, "tasks")
    head = f"Token-space gradient conflicts of {tasks} over {report.num_samples:,} samples (ratio {report.ratio:g})"
    lines = [head, *_what_was_read(report), "", block_table(report, plan, stability(report, options))]
    if has_units(report):
        lines.append(
            f"± is half of the {LEVEL:.0%} interval; the share after a choice is that of the resamples that make it, "
            "each of them the same batches in all blocks"
            + ("; where not all tasks get a module, of those that give one to any" if _is_partial(plan) else "")
        )
    if len(report.ratios) > 1:
        lines += ["", ratio_table(report)]
    return "\n".join([*lines, *_pairs(report), "", *_costs(report, plan), *_warnings(report)])


def block_table(
    report: "ConflictReport", plan: ExpansionPlan | None, shares: Mapping[str, Tensor] | None = None
) -> str:
    """One row per block: width, rank, both rates ± half of their intervals, what ``plan`` puts there, how stably."""
    rows = [["block", "p", "rank", "range rate", "null rate", "plan" if plan else ""]]
    unshared = why_unshared(report)
    cells = [_rate_cells(report, space) for space in ("range", "null")]
    for d, (block, width) in enumerate(report.num_features.items()):
        row = [block, str(width), str(report.ranks[d].item())]
        if block in unshared:
            rows.append([*row, "-", "-", unshared[block]])
            continue
        marks = []
        if plan is not None:
            for word, kind in (("modulate", "modulation"), ("expand", "expansion")):
                if tasks := getattr(plan, kind).get(block):
                    share = math.nan if shares is None else shares[kind][d].item()
                    marks.append(_mark(word, tasks, plan) + ("" if math.isnan(share) else f" {share:.0%}"))
        rows.append([*row, cells[0][d], cells[1][d], " + ".join(marks)])
    return "\n".join(ruled(aligned(rows, "<>>>><")))


def ratio_table(report: "ConflictReport") -> str:
    """One row per ratio: the ranks it gives, and one letter per block for what the plan then puts there."""
    rows = [["ratio", "ranks", "blocks, first to last"]]
    for ratio in sorted(report.ratios):
        other = report.at(ratio)
        plan, ranks = other.plan(**report.plan_options), other.ranks
        letters = [
            "·MEB"[(block in plan.modulation) + 2 * (block in plan.expansion)] if block in other.shared_blocks else "-"
            for block in other.blocks
        ]
        rows.append([f"{ratio:g}", f"{ranks.min().item()}-{ranks.max().item()}", "".join(letters)])
    return "\n".join(["Plans by ratio (M modulate, E expand, B both, · neither)", *aligned(rows, ">><")])


def why_unshared(report: "ConflictReport") -> dict[str, str]:
    """Why each of the blocks that have no rates has none, by block."""
    shared, reached = set(report.shared_blocks), report.reached
    return {
        block: NEVER_MET if reached is not None and int(reached[d].sum()) > 1 else NOT_REACHED
        for d, block in enumerate(report.blocks)
        if block not in shared
    }


def has_units(report: "ConflictReport") -> bool:
    """Whether the report can have intervals."""
    return report.units is not None and len(report.units.batches) >= MIN_UNITS


def _rate_cells(report: "ConflictReport", space: str) -> list[str]:
    rates = (report.range_rates if space == "range" else report.null_rates).tolist()
    if not has_units(report):  # intervals would warn, and summary says it anyway
        return [f"{rate:.1%}" for rate in rates]
    half = (report.intervals(space).diff(dim=1) / 2).flatten().tolist()
    return [f"{rate:.1%}" + ("" if math.isnan(h) else f" ± {100 * h:.1f}") for rate, h in zip(rates, half, strict=True)]


def _what_was_read(report: "ConflictReport") -> list[str]:
    lines = []
    if report.num_batches:
        settled = {True: "; the plan is settled", False: "; the plan is not settled", None: ""}[report.settled]
        batches = f"{report.num_batches:,} batches of gradients"
        lines.append(f"Read {report.num_samples:,} samples of tokens and {batches}{settled}")
    lines += [
        f"skipped: task {task!r} in {batches:,} batches, which have no labels of it"
        for task, batches in report.skipped.items()
        if batches
    ]
    if report.units is not None and not has_units(report):
        lines.append(
            f"no intervals: they take {MIN_UNITS} batches, and {len(report.units.batches)} were read: read more"
        )
    return lines


def _pairs(report: "ConflictReport") -> list[str]:
    """The pairs of tasks at both ends, which the rates of blocks average away."""
    rates = report.range_counts.sum(0).double() / report.valid_counts.sum(0).double()
    first, second = torch.triu_indices(len(report.tasks), len(report.tasks), 1)
    known = [
        (rates[i, j].item(), f"{report.tasks[i]} · {report.tasks[j]}")
        for i, j in zip(first.tolist(), second.tolist(), strict=True)
        if not rates[i, j].isnan()
    ]
    if len(known) < 2:
        return []
    (low, least), (high, most) = min(known), max(known)
    line = f"range rates of pairs of tasks, over all blocks: {low:.1%} ({least}) to {high:.1%} ({most})"
    blocks = report.range_rates[~report.range_rates.isnan()]
    by_pairs = report.plan_options.get("strategy") == "pairs"  # which is then no news
    if not by_pairs and high - low > PAIRS_RULE * (blocks.max() - blocks.min()).item():
        line += (
            f"; blocks lie {100 * (blocks.max() - blocks.min()).item():.1f} points apart: see plan(strategy='pairs')"
        )
    return [line]


def _is_partial(plan: ExpansionPlan) -> bool:
    """Whether there is a block where some tasks get a module and others do not."""
    return any(len(tasks) < len(plan.tasks) for added in (plan.modulation, plan.expansion) for tasks in added.values())


def _costs(report: "ConflictReport", plan: ExpansionPlan) -> list[str]:
    num_shared, unshared = len(report.shared_blocks), why_unshared(report)
    blocks = f"{num_shared} blocks"
    if unshared:
        which = "that two or more tasks reach"
        if NEVER_MET in unshared.values():
            which = "where two or more tasks have gradients at the same token"
        blocks = f"the {num_shared} blocks (of {len(report.blocks)}) {which}"
    lines = [
        f"plan({_written(report.plan_options)}) modulates {len(plan.modulation)} and expands {len(plan.expansion)} of "
        f"{blocks}: {plan.added_parameters():,} parameters with {plan.num_tokens} task tokens"
    ]
    if num_shared:
        one = max(_parameters_of(plan, task) for task in plan.tasks)
        lines.append(
            f"one task alone: {one:,} parameters, {plan.compute(plan.tasks[0]):.2f} × the blocks of the plain model; "
            f"all {len(plan.tasks)}: {plan.added_parameters():,} parameters, {plan.compute():.2f} ×"
        )
    return lines


def _written(options: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={'...' if isinstance(value, Mapping) else repr(value)}" for name, value in options.items()
    )


def _parameters_of(plan: ExpansionPlan, task: str) -> int:
    """Those that a model of this task alone has."""
    widths = plan.num_features
    modulated = sum(2 * widths[block] for block, tasks in plan.modulation.items() if task in tasks)
    return modulated + sum(plan.num_tokens * widths[block] for block, tasks in plan.expansion.items() if task in tasks)


def _warnings(report: "ConflictReport") -> list[str]:
    lines = _heads(report)
    if report.units is None or not has_units(report):
        return lines
    # one of many intervals misses the rate by chance: all of them together are to hold theirs at LEVEL
    level = 1 - (1 - LEVEL) / (2 * max(1, len(report.shared_blocks)))
    edges = torch.cat([report.intervals("range", level), report.intervals("null", level)])
    edges = edges[~edges.isnan().any(1)]
    if len(edges) and ((edges[:, 0] <= CHANCE) & (edges[:, 1] >= CHANCE)).all():
        lines.append(
            "warning: no rate is surely other than 50%, if the intervals are to hold all at once: that of gradients "
            "that have nothing to do with each other"
            + (": train the heads first" if any(math.isnan(gain) for gain, _ in label_gains(report).values()) else "")
        )
    elif len(edges) and (edges[:, 1] < CHANCE).all():
        lines.append(
            "note: every rate is surely below 50%: these tasks agree more than they conflict, so that blocks with "
            "modules of their own may win little"
        )
    share = agreement(report, **report.plan_options)
    if math.isnan(share):
        rare = informative_units(report.units.valid.sum(2)) < MIN_UNITS
        names = [block for block, few in zip(report.blocks, rare.tolist(), strict=True) if few]
        block = next(block for block in names if block in report.shared_blocks)
        lines.append(
            f"warning: how stable the plan is cannot be said, because fewer than {MIN_UNITS} batches had anything to "
            f"count in block {block!r}: read more"
        )
    if share < LEVEL:
        more = batches_to_settle(report, **report.plan_options)
        advice = f"{MOST_TIMES:,} times as many batches would not settle it, so its blocks are about equal"
        if more is not None:
            advice = f"read about {more:,} more batches"
        if more is not None and more > FAR * report.num_batches:
            advice += ", or take it as it is: blocks that need so many are about equal"
        lines.append(f"warning: only {share:.0%} of the resamples make this plan: {advice}")
    return lines


def _heads(report: "ConflictReport") -> list[str]:
    """About heads that have learnt nothing yet."""
    tasks, gains = untrained(report), label_gains(report)
    if report.head_losses is None or not tasks:
        return []
    named = _listed([f"{task!r} ({gains[task][0]:.1%} ± {100 * gains[task][1]:.1f})" for task in tasks], "heads")
    # a few batches can leave a head that has learnt much in doubt
    more = len(report.head_losses) < HEAD_BATCHES and any(gains[task][0] > LEARNT for task in tasks)
    return [
        f"warning: the losses do not show that these heads have learnt which labels belong to which image: {named}. "
        "Rates of untrained heads are those of the heads as they happen to be, not of the tasks: train them first"
        + (", or, where ± is larger than a gain, read more batches" if more else "")
    ]


def _mark(word: str, tasks: Sequence[str], plan: ExpansionPlan) -> str:
    return word if len(tasks) == len(plan.tasks) else f"{word} ({_listed(plan.owners(tasks), 'streams')})"


def _listed(names: Sequence[str], kind: str) -> str:
    return (
        ", ".join(names) if len(names) <= 3 * MOST_NAMES else f"{', '.join(names[:MOST_NAMES])} … ({len(names)} {kind})"
    )


def aligned(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """A line for each row, its columns as wide as they have to be, each ``<`` or ``>`` as ``align`` says."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)).rstrip() for row in rows]


def ruled(lines: Sequence[str]) -> list[str]:
    """A table's lines with a rule under the first."""
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]
