"""The picture of a comparison."""

import math
from typing import TYPE_CHECKING, Any

from ..plots import CHANCE, EMPTY, NULL, RANGE, TEXT
from .arms import CONFLICT, JOINT
from .table import known, with_interval

if TYPE_CHECKING:
    from .result import Comparison

ROW = 0.42
"""Inches of an arm."""


def draw(comparison: "Comparison") -> Any:
    """A matplotlib figure: Δm of every arm over joint training, a dot for each seed, the mean and its interval."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot() needs matplotlib: pip install "dtme-kernels[compare]"') from error
    arms = [arm for arm in comparison.arms if arm != JOINT]
    figure = Figure(figsize=(8.0, 1.5 + ROW * max(2, len(arms))), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-comparison.margin, comparison.margin, color=EMPTY, linewidth=0, zorder=0)
    axes.axvline(0, color=CHANCE, linewidth=0.9, linestyle="--", zorder=1)
    for row, arm in enumerate(arms):
        _draw_arm(axes, row, comparison, arm)
    axes.set_yticks(range(len(arms)), arms, fontsize=9)
    axes.set_ylim(max(len(arms), 2) - 0.4, -0.6)
    axes.set_xlabel("Δm over joint training of the same seed, in % (higher is better)", fontsize=9, color=TEXT)
    count = len(comparison.seeds)
    what = "dots: seeds · bars: means with 95% intervals" if count > 1 else "one seed: no intervals"
    axes.set_title(
        f"{what} · grey: differences below the margin of {comparison.margin:g}", fontsize=8, color=CHANCE, loc="left"
    )
    figure.suptitle(
        f"{len(arms)} arms against joint training, {count} seed{'s' if count > 1 else ''}",
        fontsize=11,
        color=TEXT,
        x=0.01,
        ha="left",
    )
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _draw_arm(axes: Any, row: int, comparison: "Comparison", arm: str) -> None:
    color = NULL if arm == CONFLICT else RANGE
    values = comparison.delta_m(arm)
    found = known(values)
    # side by side, so that seeds that are equal are seen
    step = 0.36 / max(1, len(values) - 1)
    heights = [row - 0.18 + step * i if len(values) > 1 else row for i in range(len(values))]
    shown = [(value, height) for value, height in zip(values, heights, strict=True) if math.isfinite(value)]
    axes.scatter([x for x, _ in shown], [y for _, y in shown], s=16, color=color, alpha=0.45, linewidth=0, zorder=2)
    note = "no Δm" if not found.n else with_interval(found, signed=True)
    if found.n > 1:
        axes.errorbar(
            found.mean,
            row,
            xerr=found.half_width,
            fmt="D",
            markersize=5,
            color=color,
            elinewidth=1.8,
            capsize=4,
            zorder=3,
        )
        note += f"  {comparison.difference(arm).word}"
    if arm in comparison.diverged:
        note += f", {len(comparison.diverged[arm])} diverged"
    axes.annotate(
        note, (1, row), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8, color=TEXT
    )
