"""The figures of the report on fair joint training, the same bytes for the same runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtme.plots import CHANCE, EMPTY, TEXT

from ..report.figures import COLOURS, WIDTH, draw_each, label
from ..runner.tune import JOINT
from .comparison import Effect, Study
from .tables import rows_of

MARKS = ("o", "s", "D", "^")
READING = "mean, 95 % interval (filled: without 0), seeds"
ACROSS = 2
"""Panels side by side."""


def draw(studies: list[Study], to: Path) -> list[str]:
    """Draw what there is to see into the folder ``to``; returns the file names."""
    return draw_each({"transfer.png": transfer, "tasks.png": tasks}, studies, to, dpi=110)


def _panels(studies: list[Study], height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    across = min(ACROSS, len(studies))
    down = -(-len(studies) // across)
    figure = Figure(figsize=(WIDTH if across == 1 else 1.35 * WIDTH, height * down + 0.4), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[len(studies) :]:
        axes.set_visible(False)
    return figure, grid[: len(studies)]


def _style(axes: Any, ticks: Sequence[str], title: str, unit: str) -> None:
    axes.axvline(0, color=CHANCE, linewidth=1, linestyle="--", zorder=0)
    axes.set_yticks(range(len(ticks)), ticks, fontsize=8)
    axes.set_ylim(len(ticks) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=EMPTY)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10, color=TEXT)
    axes.set_xlabel(unit, fontsize=8)


def _limit(axes: Any, drawn: list[tuple[float, Effect, str]]) -> None:
    """Show every seed, and intervals as far as they do not squeeze the seeds to a line; those that go on have an
    arrow."""
    dots = [value for _, effect, _ in drawn for value in effect.by_seed.values()] + [0.0]
    span = max(max(dots) - min(dots), 1e-6)
    ends = [end for _, e, _ in drawn for end in (e.estimate.low, e.estimate.high) if not math.isnan(end)]
    shown = dots + [min(max(end, min(dots) - span), max(dots) + span) for end in ends]
    margin = 0.05 * (max(shown) - min(shown)) or 1.0
    low, high = min(shown) - margin, max(shown) + margin
    axes.set_xlim(low, high)
    for row, effect, colour in drawn:
        for end, mark, goes_on in ((low, "<", effect.estimate.low < low), (high, ">", effect.estimate.high > high)):
            if goes_on:
                axes.plot([end], [row], mark, color=colour, markersize=5, clip_on=False)


def _interval(axes: Any, row: float, effect: Effect, colour: str, mark: str, dots: float) -> None:
    """Mean and interval on the line ``row``, the seeds ``dots`` below it; filled where the interval leaves out 0."""
    e = effect.estimate
    seeds = list(effect.by_seed.values())
    axes.plot(seeds, [row + dots] * len(seeds), "o", markersize=3, alpha=0.6, color=colour, markeredgewidth=0)
    if not math.isnan(e.half_width):
        axes.plot([e.low, e.high], [row, row], color=colour, linewidth=1.7, solid_capstyle="butt")
    face = colour if effect.sign else "white"
    axes.plot([e.mean], [row], mark, markersize=5, markerfacecolor=face, markeredgecolor=colour)


def transfer(studies: list[Study]) -> Any:
    """Δm over single-task runs, a panel per OUT, a line per condition and arm; None where nothing is known."""
    lines = {
        study.title: [row for row in rows_of(study) if row[2].total.estimate.n]  # of conditions that were run
        for study in studies
    }
    shown = [study for study in studies if lines[study.title]]
    if not shown:
        return None
    figure, panels = _panels(shown, 1.1 + 0.36 * max(map(len, lines.values())))
    for axes, study in zip(panels, shown, strict=True):
        order = list(study.conditions)
        drawn = []
        for row, (result, _, found) in enumerate(lines[study.title]):
            place = order.index(result.condition.key)
            _interval(axes, row, found.total, COLOURS[place], MARKS[place], 0.2)
            drawn.append((float(row), found.total, COLOURS[place]))
        ticks = [label(f"{r.arms[arm].title}, {r.condition.title}") for r, arm, _ in lines[study.title]]
        unit = f"Δm over single-task runs in %\n{READING}"
        _style(axes, ticks, study.title, unit)
        _limit(axes, drawn)
    return figure


def tasks(studies: list[Study]) -> Any:
    """The terms of Δm of joint training, a panel per OUT, a colour per condition; None where nothing is known."""
    shown = [study for study in studies if any(_joint(study).values())]
    if not shown:
        return None
    from matplotlib.lines import Line2D

    figure, panels = _panels(shown, 1.2 + 0.62 * max(len(study.tasks) for study in shown))
    handles: dict[str, Any] = {}
    for axes, study in zip(panels, shown, strict=True):
        known, drawn, order = _joint(study), [], list(study.conditions)
        for row, task in enumerate(study.tasks):
            for key, terms in known.items():
                place = order.index(key)
                at = row + 0.19 * (place - (len(order) - 1) / 2)
                colour, mark = COLOURS[place], MARKS[place]
                if task in terms:
                    _interval(axes, at, terms[task], colour, mark, 0.07)
                    drawn.append((at, terms[task], colour))
                title = study.conditions[key].title
                handles.setdefault(title, Line2D([], [], color=colour, marker=mark, markersize=5, label=title))
        unit = f"joint over single-task runs in %\n{READING}"
        _style(axes, list(study.tasks), study.title, unit)
        _limit(axes, drawn)
    figure.legend(handles=list(handles.values()), loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    return figure


def _joint(study: Study) -> dict[str, dict[str, Effect]]:
    """Condition -> task -> what joint training does to it, where it is known."""
    return {
        key: {task: effect for task, effect in result.transfer[JOINT].tasks.items() if effect.estimate.n}
        for key, result in study.results.items()
        if JOINT in result.transfer
    }
