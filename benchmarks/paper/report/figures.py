"""The figures of a report as PNG, the same bytes for the same runs."""

import math
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dtme.comparison.statistics import estimate
from dtme.files import write_beside
from dtme.map_plots import INK
from dtme.plots import CHANCE, EMPTY, NULL, RANGE, TEXT

from .comparison import ArmResult, Comparison
from .forest import style
from .text import plain

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart; the baseline has the first."""
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
QUIET = "#c8c8c8"
MOST_COLOURED = len(COLOURS)
MOST_LARGE = 12
"""Panels; more are smaller and five abreast."""
LABEL = 34
"""Characters of a title in a line."""
WIDTH = 9.0
"""Inches."""


def draw(comparison: Comparison, to: Path) -> list[str]:
    """Draw what there is to see into the folder ``to``; returns the names, as ``draw_each`` does."""
    makers = {"differences.png": differences, "tasks.png": tasks, "conflicts.png": conflicts, "losses.png": losses}
    return draw_each(makers, comparison, to)


def draw_each(makers: Mapping[str, Callable[[Any], Any]], of: Any, to: Path, dpi: int = 130) -> list[str]:
    """Draw what there is to see into the folder ``to``, and remove what an earlier report left there.

    PNG are written without the version of matplotlib, so that equal figures are equal files.

    Args:
        makers: file name -> what makes its figure of ``of``, or None where there is nothing to see.

    Returns:
        the names of the files that were drawn.
    """
    drawn = []
    for name, make in makers.items():
        figure = make(of)
        if figure is None:
            (to / name).unlink(missing_ok=True)
            continue
        write_beside(to / name, partial(figure.savefig, dpi=dpi, metadata={"Software": None}))
        drawn.append(name)
    return drawn


def blank(width: float, height: float) -> Any:
    """A figure of so many inches that finds room for its labels by itself."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def label(title: str, width: int = LABEL) -> str:
    """A title in at most two lines; of a longer one the middle is left out, for variants often differ at the end."""
    lines = textwrap.wrap(title, width)
    if len(lines) <= 2:
        return "\n".join(lines)
    return f"{title[: width - 1].rstrip()}…\n…{title[1 - width :].lstrip()}"


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=TEXT)


def differences(comparison: Comparison) -> Any:
    """Paired differences of Δm: a dot per seed, the mean and its 95 % interval; None without any pair."""
    tests = {name: test for name, test in comparison.differences.items() if test.by_seed}
    if not tests:
        return None
    figure = blank(WIDTH, 1.3 + 0.36 * len(tests))
    axes = figure.subplots()
    for row, test in enumerate(tests.values()):
        values = list(test.by_seed.values())
        # dots of seeds lie on a line of their own, under the interval, so that neither hides the other
        axes.plot(values, [row + 0.22] * len(values), "o", markersize=4, alpha=0.7, color=CHANCE, markeredgewidth=0)
        e = test.difference
        if not math.isnan(e.half_width):
            axes.plot([e.low, e.high], [row, row], color=RANGE, linewidth=1.8, solid_capstyle="butt")
        filled = {"markerfacecolor": RANGE if test.is_better else "white", "markeredgecolor": RANGE}
        axes.plot([e.mean], [row], "D", markersize=5.5, **filled)
    _limit(axes, list(tests.values()))
    unit = (
        "points of Δm, right is better; diamond: mean with 95 % interval, filled if significantly better; dots: seeds"
    )
    title = f"Δm minus that of {label(comparison.arms[comparison.baseline].title, 60)}, paired by seed"
    style(axes, [label(comparison.arms[name].title) for name in tests], title, unit)
    return figure


def _limit(axes: Any, tests: list[Any]) -> None:
    """Show every seed and interval, but do not let the wide interval of two seeds squeeze all others to a line."""
    dots = np.array([value for test in tests for value in test.by_seed.values()] + [0.0])
    ends = np.array([end for t in tests for end in (t.difference.low, t.difference.high) if not math.isnan(end)])
    span = max(dots.max() - dots.min(), 1e-6)
    shown = np.append(dots, np.clip(ends, dots.min() - span, dots.max() + span))
    low, high = shown.min(), shown.max()
    margin = 0.04 * (high - low) or 1.0
    low, high = low - margin, high + margin
    axes.set_xlim(low, high)
    for row, test in enumerate(tests):  # an interval that goes on has an arrow
        for end, marker, goes_on in ((low, "<", test.difference.low < low), (high, ">", test.difference.high > high)):
            if goes_on:
                axes.plot([end], [row], marker, color=RANGE, markersize=6, clip_on=False)


def tasks(comparison: Comparison) -> Any:
    """Heat map of the terms of Δm, arms by tasks; None if no term is known."""
    arms = [arm for arm in comparison.arms.values() if arm.name != comparison.reference and any(arm.terms.values())]
    if not arms:
        return None
    names = comparison.tasks
    values = np.array([[_mean(arm.terms[task]) for task in names] for arm in arms])
    most = max(np.nanmax(np.abs(values)), 1e-6)
    figure = blank(max(6.5, min(16.0, 3.2 + 0.85 * len(names))), 1.7 + 0.3 * len(arms))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    axes.set_facecolor(EMPTY)
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        red, green, blue, _ = image.to_rgba(value)
        is_dark = not math.isnan(value) and 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        style = {"ha": "center", "va": "center", "fontsize": 7.5, "color": "white" if is_dark else INK}
        axes.text(column, row, plain(value, 1, sign=True), **style)
    turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 9 else {}
    axes.set_xticks(range(len(names)), names, fontsize=8, **turned)
    axes.set_yticks(range(len(arms)), [label(arm.title) for arm in arms], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30, format=lambda value, _: f"{value:+.3g}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    bar.set_label("%, blue is better", fontsize=8, color=TEXT)
    _title(axes, f"Mean gain over {label(comparison.arms[comparison.reference].title, 28)}")
    return figure


def _mean(by_seed: dict[int, float]) -> float:
    return float(np.mean(list(by_seed.values()))) if by_seed else math.nan


def conflicts(comparison: Comparison) -> Any:
    """A panel per arm: rates by block at the start (hollow) and the end (filled), means over seeds; None if none."""
    arms = [arm for arm in comparison.arms.values() if any(arm.conflicts.values())]
    if not arms:
        return None
    columns = min(3 if len(arms) <= MOST_LARGE else 5, len(arms))
    rows = -(-len(arms) // columns)
    width, height = (3.2, 2.2) if len(arms) <= MOST_LARGE else (2.4, 1.8)
    legend = {1: 2, 2: 3}.get(columns, 5)  # as many columns of it as the panels have room for
    figure = blank(width * columns + 0.4, height * rows + 0.3 + 0.2 * -(-5 // legend))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(arms) :]:
        axes.set_visible(False)
    for place, (axes, arm) in enumerate(zip(grid.flat, arms, strict=False)):
        _conflicts_of(axes, arm)
        if place + columns >= len(arms):  # nothing below it
            axes.set_xlabel("block", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("conflict rate", fontsize=8)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=legend, frameon=False, fontsize=8)
    return figure


def _conflicts_of(axes: Any, arm: ArmResult) -> None:
    axes.axhline(0.5, color=CHANCE, linewidth=0.9, linestyle="--", zorder=0, label="chance")
    for space, color, marker in (("range", RANGE, "o"), ("null", NULL, "s")):
        for moment in ("start", "end"):
            rates = [c.rates[space] for c in arm.conflicts[moment].values()]
            is_end = moment == "end"
            style = {"color": color, "marker": marker, "markersize": 4, "label": f"{space} space, {moment}"}
            style |= {"linewidth": 1.6, "alpha": 1.0} if is_end else {"linewidth": 1, "alpha": 0.75, "linestyle": ":"}
            style |= {} if is_end else {"markerfacecolor": "white"}
            blocks = max(map(len, rates), default=0)
            same = [rate for rate in rates if len(rate) == blocks]
            axes.plot(range(1, blocks + 1), np.mean(same, axis=0) if same else [], **style)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.tick_params(labelsize=7.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(label(arm.title, 30), loc="left", fontsize=8.5, color=TEXT)


def losses(comparison: Comparison) -> Any:
    """A panel per task: training loss by tenth of the training, means over seeds; None without any."""
    arms = [arm for arm in comparison.arms.values() if any(arm.losses.values())]
    names = [task for task in comparison.tasks if any(arm.losses.get(task) for arm in arms)]
    if not names:
        return None
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    chosen = coloured(comparison, arms)
    legend_rows = -(-(len(chosen) + 1) // 3)
    figure = blank(3.2 * columns + 0.4, 2.3 * rows + 0.25 * legend_rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, task in zip(grid.flat, names, strict=False):
        for arm in arms:
            curve = _curve(list(arm.losses[task].values()))
            at = [100 * (i + 0.5) / len(curve) for i in range(len(curve))]
            style = {"color": QUIET, "linewidth": 0.8, "zorder": 1}
            if arm.name in chosen:
                place = chosen.index(arm.name)
                style = {"color": COLOURS[place], "linestyle": DASHES[place], "linewidth": 1.7, "zorder": 3}
            axes.plot(at, curve, marker="o" if len(curve) == 1 else None, markersize=3, **style)
        axes.set_title(f"{task}", loc="left", fontsize=9, color=TEXT)
        axes.tick_params(labelsize=7.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("% of training", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("training loss", fontsize=8)
    _legend(figure, comparison, chosen, len(arms) - len(chosen), columns)
    return figure


def coloured(comparison: Comparison, arms: list[ArmResult]) -> list[str]:
    """The arms that get a colour: the baseline, then those of the highest Δm; the others are grey."""
    names = [arm.name for arm in arms]
    best = sorted(names, key=lambda name: -np.nan_to_num(_mean(comparison.arms[name].delta_m), nan=-math.inf))
    first = [comparison.baseline] if comparison.baseline in names else []
    return (first + [name for name in best if name not in first])[:MOST_COLOURED]


def _curve(curves: list[list[float]]) -> list[float]:
    """The mean over seeds, for the parts of the training that all of them have."""
    shortest = min(map(len, curves), default=0)
    return [estimate([c[i] for c in curves if math.isfinite(c[i])]).mean for i in range(shortest)]


def _legend(figure: Any, comparison: Comparison, chosen: list[str], others: int, columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[i], linestyle=DASHES[i], label=label(comparison.arms[name].title, 30))
        for i, name in enumerate(chosen)
    ]
    if others:
        handles.append(Line2D([], [], color=QUIET, linewidth=0.8, label=f"{others} other arms"))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=8)
