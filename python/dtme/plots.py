"""The picture of a conflict report."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .plan import ExpansionPlan
from .tables import NEVER_MET, NOT_REACHED, has_units, why_unshared

if TYPE_CHECKING:
    from .report import ConflictReport

RANGE, NULL, TEXT, EMPTY, CHANCE = "#2f6fb0", "#d9772b", "#444444", "#eeeeee", "#8a8a8a"
STACKED_PAIRS = 12
"""Up to so many pairs of tasks the two heat maps are under each other, each column under its block."""
MOST_PAIRS = 150
"""Beyond, a row per pair would be too low to read: a matrix of the tasks is shown instead."""
MOST_LABELS = 40
UNSHARED = {
    NOT_REACHED: "blocks that fewer than two tasks reach",
    NEVER_MET: "blocks where no two tasks have gradients at the same token",
}
TOP_HEIGHT = 4.6
"""Inches of what is above the heat maps."""


def plot_report(report: "ConflictReport", plan: ExpansionPlan, shares: Mapping[str, Tensor] | None = None) -> Any:
    """A matplotlib figure: rates per block, the plan's choices underneath, and the rates of every pair of tasks.

    Many pairs are shown side by side for the two spaces; too many for a row each as matrices of the tasks, over the
    blocks that the plan touches. ``shares``, of ``ConflictReport.stability``, are written on the plan's choices.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install 'dtme-kernels[plot]'") from error
    num_blocks, num_tasks = len(report.blocks), len(report.tasks)
    num_pairs = num_tasks * (num_tasks - 1) // 2
    width = min(max(8.0, 0.5 * num_blocks + 2.5), 15.0)
    if num_pairs <= STACKED_PAIRS:
        height = 0.3 * num_pairs + 0.3
        figure = Figure(figsize=(width, TOP_HEIGHT + 2 * height), layout="constrained")
        axes = figure.subplots(4, 1, sharex=True, height_ratios=[3.2, 0.55, height, height])
        top, choice, maps = axes[0], axes[1], [axes[2], axes[3]]
        labelled = [axes[3]]
    else:
        width = max(width, 9.0)
        height = 0.145 * num_pairs if num_pairs <= MOST_PAIRS else width / 2 - 0.8
        figure = Figure(figsize=(width, TOP_HEIGHT + height), layout="constrained")
        grid = figure.add_gridspec(3, 2, height_ratios=[3.2, 0.55, height])
        top = figure.add_subplot(grid[0, :])
        choice = figure.add_subplot(grid[1, :], sharex=top)
        top.tick_params(labelbottom=False)
        maps = [figure.add_subplot(grid[2, k]) for k in (0, 1)]
        labelled = [choice, *maps] if num_pairs <= MOST_PAIRS else [choice]
    _rates(top, report)
    _choice(choice, report, plan, shares)
    _heat_maps(figure, maps, report, plan, num_pairs)
    for axes in labelled:
        _name_blocks(axes, report.blocks, width - 1.5 if len(labelled) < 3 or axes is choice else width / 2 - 1.5)
    return figure


def _rates(axes: Any, report: "ConflictReport") -> None:
    positions = torch.arange(len(report.blocks), dtype=torch.float64)
    size = 5 if len(report.blocks) <= 24 else 3.5
    has_intervals = has_units(report) and not report.intervals("range").isnan().all()
    for values, space, color, marker, shift in (
        (report.range_rates, "range", RANGE, "o", -0.07),
        (report.null_rates, "null", NULL, "s", 0.07),
    ):
        style = {"color": color, "marker": marker, "markersize": size, "linewidth": 1.6, "label": f"{space} space"}
        if not has_intervals:
            axes.plot(positions, values.tolist(), **style)
            continue
        low, high = report.intervals(space).unbind(1)
        around = torch.stack([values - low, high - values]).clamp(min=0)
        axes.errorbar(positions + shift, values, around.numpy(), elinewidth=1, capsize=min(3, size - 2), **style)
    unshared = why_unshared(report)
    for d, block in enumerate(report.blocks):
        if block in unshared:
            axes.axvspan(d - 0.5, d + 0.5, color=EMPTY, linewidth=0, zorder=0)
    notes = ["bars: 95% intervals"] if has_intervals else []
    if unshared:
        notes.append("grey: " + ", ".join(text for why, text in UNSHARED.items() if why in unshared.values()))
    # a line of its own: beside the title it would lie over it in a narrow picture
    axes.annotate(
        " · ".join(notes), (0, 1), (0, 5), "axes fraction", "offset points", va="bottom", fontsize=9, color=CHANCE
    )
    axes.set_xlim(-0.5, len(report.blocks) - 0.5)
    axes.axhline(0.5, color=CHANCE, linewidth=0.9, linestyle="--", zorder=0)
    # outside, where no curve runs
    axes.annotate(
        "chance\n50%",
        (1, 0.5),
        (4, 0),
        ("axes fraction", "data"),
        "offset points",
        va="center",
        fontsize=8,
        color=CHANCE,
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.set_ylabel("conflicting (token, pair)s")
    axes.set_title(
        "Token-space gradient conflicts by block", loc="left", fontsize=11, color=TEXT, pad=20 if notes else 6
    )
    axes.legend(frameon=False, ncols=2, loc="best", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _choice(axes: Any, report: "ConflictReport", plan: ExpansionPlan, shares: Mapping[str, Tensor] | None) -> None:
    unshared, is_shown = why_unshared(report), False
    few = len(report.blocks) <= 24
    for row, (kind, color) in enumerate((("modulation", RANGE), ("expansion", NULL))):
        blocks = getattr(plan, kind)
        for d, block in enumerate(report.blocks):
            if block in unshared:
                axes.text(d, row, "–", ha="center", va="center", color=CHANCE, fontsize=8)
                continue
            members = len(blocks.get(block, ())) / len(plan.tasks)
            fill = {"color": color, "alpha": 0.35 + 0.65 * members} if members else {"color": EMPTY}
            axes.barh(row, 0.9, left=d - 0.45, height=0.8, **fill)
            share = math.nan if shares is None else 100 * shares[kind][d].item()
            is_shown |= not math.isnan(share)
            if share >= 1:  # in how many of the resamples the block is chosen
                style = {"color": "white" if members > 0.5 else TEXT, "fontsize": 8 if few else 6}
                axes.text(d, row, f"{share:.0f}%" if few else f"{share:.0f}", ha="center", va="center", **style)
    axes.set_yticks([0, 1], ["modulation", "expansion"], fontsize=8)
    if is_shown:
        axes.set_title("% of resamples that choose the block", loc="right", fontsize=8, color=CHANCE, pad=2)
    axes.set_ylim(1.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _heat_maps(figure: Any, maps: list[Any], report: "ConflictReport", plan: ExpansionPlan, num_pairs: int) -> None:
    """The rates of pairs in both spaces in one scale of colours, which spans the rates there are."""
    chosen = [d for d, block in enumerate(report.blocks) if block in plan.blocks]
    if num_pairs > MOST_PAIRS and not chosen:
        chosen = list(range(len(report.blocks)))
    first, second = torch.triu_indices(len(report.tasks), len(report.tasks), 1)
    values: list[Tensor] = []
    for space in ("range", "null"):
        if num_pairs <= MOST_PAIRS:
            values.append(report.pair_rates(space)[:, first, second].T)
        else:
            counts = report.counts_of(space)[chosen].sum(0).double()
            values.append(counts / report.valid_counts[chosen].sum(0).double())
    scale = _colours(torch.stack(values))
    names = [f"{report.tasks[i]} · {report.tasks[j]}" for i, j in zip(first.tolist(), second.tolist(), strict=True)]
    if num_pairs > MOST_PAIRS:
        names = list(report.tasks)
    for column, (axes, rates, space) in enumerate(zip(maps, values, ("range", "null"), strict=True)):
        image = axes.imshow(rates.numpy(), aspect="auto", interpolation="nearest", **scale)
        axes.set_facecolor(EMPTY)  # where a pair has no rate
        step = 1 if num_pairs <= MOST_PAIRS else -(-len(names) // MOST_LABELS)
        side_by_side = num_pairs > STACKED_PAIRS
        rows = range(0, len(names), step)
        shown = [names[row] for row in rows] if column == 0 or not side_by_side else []
        axes.set_yticks(rows if shown else [], shown, fontsize=8 if num_pairs <= STACKED_PAIRS else 6.5)
        what = "by pair of tasks"
        if num_pairs > MOST_PAIRS:
            what = f"over the {len(chosen)} blocks of the plan"
            axes.set_xticks(rows, [names[row] for row in rows], fontsize=6.5, rotation=90)
        axes.set_title(f"{space} space, {what}", fontsize=9, loc="left", color=TEXT)
    inches = figure.get_figheight() - TOP_HEIGHT
    bar = figure.colorbar(
        image, ax=maps, format=lambda value, _: f"{100 * value:.3g}%", pad=0.01, aspect=max(15, 5 * inches)
    )
    bar.ax.set_ylim(*_ends(torch.stack(values)))  # colours of rates that are not there are not shown
    bar.ax.tick_params(labelsize=8)
    bar.set_label("rate: blue below chance, red above", fontsize=8, color=TEXT)


def _colours(rates: Tensor) -> dict[str, Any]:
    """Blue to red around chance where rates lie on both sides of it, else the one colour over the rates there are."""
    low, high = _ends(rates)
    if low < 0.5 < high:
        most = max(0.5 - low, high - 0.5)
        return {"cmap": "RdBu_r", "vmin": 0.5 - most, "vmax": 0.5 + most}
    return {"cmap": "Blues_r" if low < 0.5 else "Reds", "vmin": low, "vmax": high}


def _ends(rates: Tensor) -> tuple[float, float]:
    """The lowest and the highest rate, a little apart where there is but one."""
    known = rates[~rates.isnan()]
    low, high = (known.min().item(), known.max().item()) if len(known) else (0.0, 1.0)
    return (low, high) if low < high else (low - 0.01, high + 0.01)


def _name_blocks(axes: Any, blocks: tuple[str, ...], inches: float) -> None:
    names = _short(blocks)
    characters = 13 * inches  # that fit side by side
    level = sum(map(len, names)) + 2 * len(names) <= characters
    step = 1
    if not level:  # on end, every name is as wide as two characters
        step = -(-2 * len(names) // int(characters))
        if max(map(len, names)) <= 3:
            step, level = -(-(sum(map(len, names)) + 2 * len(names)) // int(characters)), True
    shown = range(0, len(names), step)
    axes.set_xticks(shown, [names[d] for d in shown], fontsize=8, rotation=0 if level else 90)
    axes.tick_params(axis="x", labelbottom=True)
    axes.set_xlabel("block", fontsize=9)


def _short(blocks: tuple[str, ...]) -> list[str]:
    """Names without what they all start with: 'encoder.layer.3' among its like is '3'."""
    parts = [block.split(".") for block in blocks]
    common = 0
    while all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return [".".join(p[common:]) for p in parts]
