"""The figures of the report on fair joint training, the same bytes for the same runs."""

from pathlib import Path
from typing import Any

from ..report.figures import COLOURS, WIDTH, draw_each, label
from ..report.forest import Line, limit, show, style
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


def _line(row: float, effect: Effect, colour: str, mark: str) -> Line:
    """Its mark is filled where the interval leaves out 0."""
    return Line(row, effect.by_seed.values(), effect.estimate, colour, bool(effect.sign), mark)


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
            drawn.append(_line(row, found.total, COLOURS[place], MARKS[place]))
            show(axes, drawn[-1], 0.2)
        ticks = [label(f"{r.arms[arm].title}, {r.condition.title}") for r, arm, _ in lines[study.title]]
        unit = f"Δm over single-task runs in %\n{READING}"
        style(axes, ticks, study.title, unit)
        limit(axes, drawn)
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
                    drawn.append(_line(at, terms[task], colour, mark))
                    show(axes, drawn[-1], 0.07)
                title = study.conditions[key].title
                handles.setdefault(title, Line2D([], [], color=colour, marker=mark, markersize=5, label=title))
        unit = f"joint over single-task runs in %\n{READING}"
        style(axes, list(study.tasks), study.title, unit)
        limit(axes, drawn)
    figure.legend(handles=list(handles.values()), loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    return figure


def _joint(study: Study) -> dict[str, dict[str, Effect]]:
    """Condition -> task -> what joint training does to it, where it is known."""
    return {
        key: {task: effect for task, effect in result.transfer[JOINT].tasks.items() if effect.estimate.n}
        for key, result in study.results.items()
        if JOINT in result.transfer
    }
