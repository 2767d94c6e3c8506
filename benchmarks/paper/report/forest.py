"""Forest plots: a line per effect with its mean, its 95 % interval and its seeds, and an axis that shows them all."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dtme.comparison.statistics import Estimate
from dtme.plots import CHANCE, EMPTY, TEXT


@dataclass(frozen=True)
class Line:
    """One effect of a forest plot."""

    row: float
    """Its place on the vertical axis, which points down."""
    values: Collection[float]
    """One per seed; may be none."""
    estimate: Estimate
    colour: str
    is_filled: bool
    """Whether the mark of the mean is filled."""
    mark: str = "o"


def show(axes: Any, line: Line, dots: float) -> None:
    """Draw mean and interval on the line's row, and its seeds ``dots`` rows below."""
    e = line.estimate
    at = [line.row + dots] * len(line.values)
    axes.plot(list(line.values), at, "o", markersize=3, alpha=0.6, color=line.colour, markeredgewidth=0)
    if not math.isnan(e.half_width):
        axes.plot([e.low, e.high], [line.row, line.row], color=line.colour, linewidth=1.7, solid_capstyle="butt")
    face = line.colour if line.is_filled else "white"
    axes.plot([e.mean], [line.row], line.mark, markersize=5, markerfacecolor=face, markeredgecolor=line.colour)


def limit(axes: Any, lines: Sequence[Line]) -> None:
    """Show every seed, and intervals as far as they do not squeeze the seeds to a line; those that go on have an
    arrow."""
    dots = [value for line in lines for value in (*line.values, line.estimate.mean)] + [0.0]
    span = max(max(dots) - min(dots), 1e-6)
    ends = [end for line in lines for end in (line.estimate.low, line.estimate.high) if not math.isnan(end)]
    shown = dots + [min(max(end, min(dots) - span), max(dots) + span) for end in ends]
    margin = 0.05 * (max(shown) - min(shown)) or 1.0
    low, high = min(shown) - margin, max(shown) + margin
    axes.set_xlim(low, high)
    for line in lines:
        e = line.estimate
        for end, mark, goes_on in ((low, "<", e.low < low), (high, ">", e.high > high)):
            if goes_on:
                axes.plot([end], [line.row], mark, color=line.colour, markersize=5, clip_on=False)


def style(axes: Any, ticks: Sequence[str], title: str, unit: str) -> None:
    """Name the rows 0, 1, ..., mark zero, and leave out what a forest plot does not need."""
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
