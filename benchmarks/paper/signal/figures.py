"""The figures of the signal's report as PNG, each from the numbers in ``signal.json`` alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtme.map_plots import INK
from dtme.plots import CHANCE, EMPTY, NULL, RANGE, TEXT

from ..report.figures import blank, draw_each, label
from .measurement import SPACES
from .reproducibility import AT_IMAGES, OWN
from .tables import near, pair_names, share_name
from .tallies import BLOCKS, PAIRS

Found = dict[str, Any]
COLOURS = {"range": RANGE, "null": NULL}
MARKERS = {"range": "o", "null": "s"}
EFFECTS = {
    "seed": "#7f7f7f",
    "block": "#0072b2",
    "pair": "#d55e00",
    "seed × block": "#56b4e9",
    "seed × pair": "#e69f00",
    "block × pair": "#009e73",
    "seed × block × pair": "#b7a0d0",
    "sample": "#dddddd",
}
TITLE = 56
"""Characters of a setting's title in a line."""


def draw(settings: Sequence[Found], to: Path) -> list[str]:
    """Draw all figures into the folder ``to``; returns their names."""
    makers = {"rates.png": rates, "samples.png": samples, "variance.png": variance, "cells.png": cells}
    return draw_each(makers, settings, to)


def _panels(settings: Sequence[Found], height: float, width: float = 4.2) -> tuple[Any, list[Any]]:
    """A figure with a panel per setting, two abreast."""
    columns = min(2, len(settings))
    rows = -(-len(settings) // columns)
    figure = blank(2 * width, height * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in grid[len(settings) :]:
        axes.set_visible(False)
    for axes, setting in zip(grid, settings, strict=False):
        _title(axes, setting["title"])
    return figure, grid[: len(settings)]


def _title(axes: Any, text: str) -> None:
    axes.set_title(label(text, TITLE), loc="left", fontsize=8.5, color=TEXT)


def _tidy(axes: Any) -> None:
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)


def _with_bars(axes: Any, at: Sequence[float], rows: Sequence[Sequence[float]], times: float, **style: Any) -> None:
    """A line with 95 % intervals where there are any."""
    value, low, high = times * np.array(rows, dtype=float).T
    axes.plot(at, value, markersize=6 if style["marker"] == "X" else 4, **style)
    axes.vlines(at, low, high, color=style["color"], linewidth=1, alpha=0.7)


def rates(settings: Sequence[Found]) -> Any:
    """Mean rate by share of the training, with real and with permuted labels."""
    figure, panels = _panels(settings, 2.3)
    for axes, setting in zip(panels, settings, strict=True):
        at = [100 * float(share) for share in setting["by_share"]]
        axes.axhline(50, color=CHANCE, linewidth=0.9, linestyle="--", zorder=0, label="chance")
        for space in SPACES:
            found = [one["rates"]["all"][space] for one in setting["by_share"].values()]
            style: dict[str, Any] = {"color": COLOURS[space], "marker": MARKERS[space]}
            _with_bars(axes, at, [one["rate"] for one in found], 100, **style, linewidth=1.6, label=f"{space} space")
            if all("permuted" in one for one in found):
                style |= {"linestyle": ":", "linewidth": 1.2, "markerfacecolor": "white"}
                permuted = [one["permuted"] for one in found]
                _with_bars(axes, at, permuted, 100, **style, label=f"{space}, permuted labels")
        axes.set_xlabel("% of training behind the model", fontsize=8)
        axes.set_ylabel("conflict rate %", fontsize=8)
        _tidy(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    return figure


def samples(settings: Sequence[Found]) -> Any:
    """Agreement of two samples of one model against their size: a row per setting."""
    figure = blank(8.6, 2.2 * len(settings) + 0.5)
    grid = figure.subplots(len(settings), 2, squeeze=False)
    for (left, right), setting in zip(grid, settings, strict=True):
        found, random = near(setting)["samples"], setting["random"][BLOCKS]
        at = [int(n) for n in found[BLOCKS]["range"] if n != OWN]
        left.axhspan(random["low"], random["high"], color=EMPTY, zorder=0, label="random plans, 95 %")
        left.axhline(
            random["expected"], color=CHANCE, linewidth=0.9, linestyle="--", zorder=1, label="random plans, mean"
        )
        right.axhline(0, color=CHANCE, linewidth=0.9, linestyle="--", zorder=1)
        for space in SPACES:
            style = {"color": COLOURS[space], "marker": MARKERS[space]}
            overlap = [found[BLOCKS][space][f"{n}"]["overlap"] for n in at]
            _with_bars(left, at, overlap, 1, **style, linewidth=1.6, label=f"blocks, {space} space")
            for kind, line in ((BLOCKS, "-"), (PAIRS, ":")):
                values = [found[kind][space][f"{n}"]["correlation"] for n in at]
                text = f"pairs of tasks, {space} space" if kind == PAIRS else None
                face = "white" if kind == PAIRS else COLOURS[space]
                more = {"linestyle": line, "linewidth": 1.6, "markerfacecolor": face, "label": text}
                _with_bars(right, at, values, 1, **style, **more)
            if OWN in found[BLOCKS][space]:
                alone = found[BLOCKS][space][OWN]
                style = {"color": COLOURS[space], "marker": "X", "linestyle": "none"}
                _with_bars(left, [setting["sample"]], [alone["overlap"]], 1, **style, label=f"own spaces, {space}")
                _with_bars(right, [setting["sample"]], [alone["correlation"]], 1, **style)
        left.set_ylim(-0.03, 1.03)
        right.set_ylim(min(-0.25, right.get_ylim()[0]), 1.05)
        _title(left, f"{setting['title']}, {share_name(setting['near'])} of training")
        left.set_ylabel("overlap of plans", fontsize=8)
        right.set_ylabel("rank correlation", fontsize=8)
        for axes in (left, right):
            axes.set_xscale("log", base=4)
            axes.set_xticks(at, [f"{n:,}" for n in at])
            axes.minorticks_off()
            axes.set_xlabel("images of a sample; at the right end resamples", fontsize=8)
            _tidy(axes)
    handles, labels = (
        [*first, *second] for first, second in zip(*(a.get_legend_handles_labels() for a in grid[0]), strict=True)
    )
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    return figure


def variance(settings: Sequence[Found]) -> Any:
    """Stacked shares of the variance of cells: a bar per share of the training and space."""
    figure, panels = _panels(settings, 2.4)
    for axes, setting in zip(panels, settings, strict=True):
        places, names = [], []
        for i, (share, found) in enumerate(setting["by_share"].items()):
            for j, space in enumerate(SPACES):
                place, below = i + 0.4 * (j - 0.5), 0.0
                shares = found["variance"][space]["shares"]
                for effect, colour in EFFECTS.items():
                    part = 100 * shares.get(effect, [0.0])[0]
                    axes.bar(place, part, 0.36, bottom=below, color=colour, label=effect if (i, j) == (0, 0) else None)
                    below += part
                places.append(place)
                names.append(f"{space[0]}\n{share_name(share) if j == 0 else ''}")
        axes.set_xticks(places, names, fontsize=7.5, ha="center")
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of variance", fontsize=8)
        axes.tick_params(axis="x", length=0)
        _tidy(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    figure.supxlabel(
        f"share of training; r: range, n: null space. Variance of a pair's rate in a block, from {AT_IMAGES} images",
        fontsize=8,
    )
    return figure


def cells(settings: Sequence[Found]) -> Any:
    """Heat maps of the rates, blocks by pairs: a row per setting, both spaces on one scale."""
    heights = [0.75 + 0.2 * len(setting["details"]["cells"]["range"][0]) for setting in settings]
    figure = blank(9.0, sum(heights) + 0.3)
    grid = figure.subplots(len(settings), 2, squeeze=False, height_ratios=heights)
    for row, setting in zip(grid, settings, strict=True):
        tables = {space: 100 * np.array(setting["details"]["cells"][space], dtype=float).T for space in SPACES}
        far = max(float(np.nanmax(np.abs(values - 50))) for values in tables.values()) or 1.0
        pairs = pair_names(setting)
        for axes, (space, values) in zip(row, tables.items(), strict=True):
            image = axes.imshow(values, cmap="RdBu_r", vmin=50 - far, vmax=50 + far, aspect="auto")
            axes.set_facecolor(EMPTY)
            for place in np.ndindex(values.shape):
                _write(axes, image, place, values[place])
            axes.set_xticks(range(values.shape[1]), [str(d + 1) for d in range(values.shape[1])], fontsize=7)
            axes.set_yticks(range(len(pairs)), pairs if space == SPACES[0] else [""] * len(pairs), fontsize=7)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(f"{space} space", loc="right", fontsize=8, color=COLOURS[space])
        _title(row[0], f"{setting['title']}, {share_name(setting['near'])}")
    figure.supxlabel(
        "block; rate in %, blue below 50 %, red above; each row of maps has a scale of its own", fontsize=8
    )
    return figure


def _write(axes: Any, image: Any, place: tuple[int, ...], value: float) -> None:
    if np.isnan(value):
        return
    red, green, blue, _ = image.to_rgba(value)
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
    style = {"ha": "center", "va": "center", "fontsize": 6.5, "color": "white" if is_dark else INK}
    axes.text(place[1], place[0], f"{value:.0f}", **style)
