"""The figures of the comparison as PNG, the same bytes for the same runs."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dtme.plots import CHANCE, EMPTY, NULL, RANGE, TEXT

from ..report.figures import COLOURS, WIDTH, blank, draw_each, label
from ..report.forest import Line, limit, show, style
from ..report.text import bracket
from ..runner.tune import JOINT
from .claims import Evidence
from .findings import Findings
from .folders import RANDOM, Setting
from .prediction import KINDS, OVERALL, SPACES, Prediction, by_block

RATES = {"tm": RANGE, "te": NULL}
MOST_SETTINGS = len(COLOURS)
FAR = 4
"""How many times farther from 0 than the median of the lines a mean has to be for the axis to leave it out."""
MARKS = ("o", "s", "D", "^", "v", "P", "X")
READING = "mean, 95 % interval (filled: without 0), small dots: seeds; arrow with numbers: beyond the axis"


def draw(findings: Findings, to: Path) -> list[str]:
    """Draw what there is to see into the folder ``to``; returns the file names. Figures of settings are numbered."""
    makers: dict[str, Any] = {"questions.png": questions}
    for at, title in enumerate(findings.settings, 1):
        makers |= {f"arms-{at}.png": partial(arms, title=title), f"blocks-{at}.png": partial(blocks, title=title)}
    for stale in (*to.glob("arms-*.png"), *to.glob("blocks-*.png")):  # of an earlier report on more settings
        if stale.name not in makers:
            stale.unlink()
    return draw_each(makers, findings, to, dpi=110)


def arms(findings: Findings, title: str) -> Any:
    """Δm over joint training by arm, the mean of the random plans as a band; None where no arm has it."""
    setting = findings.settings[title]
    rows = [arm for arm in setting.shown if arm.name != JOINT and arm.delta_m]
    if not rows:
        return None
    figure = blank(WIDTH, 1.35 + 0.36 * len(rows))
    axes = figure.subplots()
    drawn = []
    for row, arm in enumerate(rows):
        e = setting.against_joint[arm.name].difference
        colour = COLOURS[1] if arm.name == RANDOM else COLOURS[0]
        drawn.append(Line(row, _dots(setting, arm.name), e, colour, e.low > 0 or e.high < 0))
    reading = READING
    if RANDOM in setting.arms and not math.isnan((random := setting.against_joint[RANDOM].difference).half_width):
        axes.axvspan(random.low, random.high, color=COLOURS[1], alpha=0.13, zorder=0, linewidth=0)
        reading += "\nrandom plans: a dot per run, the band is the interval of their mean"
    unit = f"Δm over joint training of the seed in %, right is better\n{reading}"
    style(axes, [label(arm.title) for arm in rows], label(title, 80), unit)
    _show(axes, drawn, 0.22)
    return figure


def _show(axes: Any, lines: Sequence[Line], dots: float) -> None:
    """Draw the lines; those whose mean is far from all others are an arrow with their numbers, lest they squeeze
    these."""
    usual = float(np.median([_reach(line) for line in lines]))
    far = [line for line in lines if abs(line.estimate.mean) > FAR * usual]
    near = [line for line in lines if line not in far]
    for line in near:
        show(axes, line, dots)
    limit(axes, near)
    low, high = axes.get_xlim()
    for line in far:
        e, is_right = line.estimate, line.estimate.mean > 0
        end, inside = (high, -1) if is_right else (low, 1)
        axes.plot([end], [line.row], ">" if is_right else "<", color=line.colour, markersize=6, clip_on=False)
        text = {"va": "center", "ha": "right" if is_right else "left", "fontsize": 7.5, "color": line.colour}
        numbers = bracket((e.mean, e.low, e.high), 1, sign=True)
        axes.text(end + inside * 0.02 * (high - low), line.row, numbers, **text)


def _reach(line: Line) -> float:
    e = line.estimate
    return max(abs(x) for x in (e.mean, e.low, e.high) if not math.isnan(x))


def _dots(setting: Setting, name: str) -> list[float]:
    """A number per seed; of the random plans, one of every run."""
    several = setting.random if name == RANDOM else [setting.arms[name]]
    return [value for arm in several for value in arm.delta_m.values()]


def questions(findings: Findings) -> Any:
    """Every claim that is tested in some setting, a line per setting; None where none is."""
    claims = [claim for claim in findings.claims if claim.evidence]
    if not claims:
        return None
    from matplotlib.lines import Line2D

    titles = list(dict.fromkeys(one.setting for claim in claims for one in claim.evidence))
    looks = {title: (COLOURS[i % MOST_SETTINGS], MARKS[i % len(MARKS)]) for i, title in enumerate(titles)}
    most = max(len(claim.evidence) for claim in claims)
    figure = blank(1.15 * WIDTH, 1.4 + len(claims) * (0.26 + 0.15 * most) + 0.2 * -(-len(titles) // 2))
    axes = figure.subplots()
    drawn = []
    for row, claim in enumerate(claims):
        for at, one in zip(_offsets(len(claim.evidence)), claim.evidence, strict=True):
            drawn.append(_line(row + at, one, *looks[one.setting]))
        if row:
            axes.axhline(row - 0.5, color=EMPTY, linewidth=0.8, zorder=0)
    unit = f"difference of Δm in points; right: the claim holds\n{READING}"
    style(axes, [label(claim.text, 44) for claim in claims], "Every claim, by setting", unit)
    _show(axes, drawn, 0.3 / (most + 1))
    handles = [
        Line2D([], [], color=colour, marker=mark, markersize=5, label=label(title, 60))
        for title, (colour, mark) in looks.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    return figure


def _offsets(count: int) -> Sequence[float]:
    """Places of the settings of a claim around its row."""
    return [0.0] if count == 1 else np.linspace(-0.3, 0.3, count).tolist()


def _line(row: float, one: Evidence, colour: str, mark: str) -> Line:
    e = one.estimate
    return Line(row, one.by_seed.values(), e, colour, e.low > 0 or e.high < 0, mark)


def blocks(findings: Findings, title: str) -> Any:
    """A column per kind of module: the real gain of every block above its rate; None where none was measured."""
    kinds = {kind: one for kind, one in findings.predictions.get(title, {}).items() if one.seeds}
    if not kinds:
        return None
    figure = blank(max(5.0, 0.5 * WIDTH * len(kinds)), 4.8)
    grid = figure.subplots(2, len(kinds), squeeze=False, sharex="col")
    for (above, below), (kind, found) in zip(grid.T, kinds.items(), strict=True):
        _gains(above, found)
        rates = found.predictors.get(SPACES[kind])
        if rates is not None:
            _with_seeds(below, found, 100 * rates, RATES[kind])
            below.axhline(50, color=CHANCE, linewidth=0.9, linestyle="--", zorder=0)
        below.set_ylabel(f"{SPACES[kind]} conflict rate %", fontsize=8)
        below.set_xlabel("block", fontsize=8)
        below.set_xticks(found.blocks)
        for axes in (above, below):
            axes.tick_params(labelsize=7.5)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{label(title, 80)}: modules in one block at a time\nmean with 95 % interval, small dots: seeds",
        x=0.01,
        ha="left",
        fontsize=9,
        color=TEXT,
    )
    return figure


def _gains(axes: Any, found: Prediction) -> None:
    kind = found.kind
    axes.axhline(0, color=CHANCE, linewidth=0.9, linestyle="--", zorder=0)
    _with_seeds(axes, found, found.gains[OVERALL], COLOURS[0])
    axes.set_ylabel("Δm over joint %", fontsize=8)
    known = found.correlations.get(SPACES[kind], {}).get(OVERALL)
    text = KINDS[kind]
    if known is not None and known.seeds:
        text += f": rank correlation {bracket(known.best, 2, sign=True)}"
    axes.set_title(text, loc="left", fontsize=9, color=TEXT)


def _with_seeds(axes: Any, found: Prediction, values: np.ndarray, colour: str) -> None:
    """The mean of every block with its interval, and its seeds beside it."""
    means = np.array(by_block(values), dtype=float)
    at = np.array(found.blocks, dtype=float)
    for row in values:
        axes.plot(at + 0.18, row, "o", markersize=3, alpha=0.5, color=colour, markeredgewidth=0)
    axes.plot(at, means[:, 0], "o", markersize=5, color=colour)
    axes.vlines(at, means[:, 1], means[:, 2], color=colour, linewidth=1.5)
