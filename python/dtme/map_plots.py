"""Pictures of conflict maps: over an image, or over the words of a sentence."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import write_beside
from .plots import TEXT

MOST_LEADING = 16
"""Class and register tokens, at most, where the grid has to be guessed."""
INK, PAPER, QUIET = "#1a1a1a", "#ffffff", "#9a9a9a"


def plot_conflict_map(
    maps: Mapping[tuple[str, str], Tensor],
    path: str | os.PathLike[str],
    *,
    images: Any = None,
    tokens: Sequence[Any] | None = None,
    grid: tuple[int, int] | None = None,
    row: int = 0,
    worst: int = 8,
) -> None:
    """Draw what ``conflict_map`` found, a panel per pair of tasks: red where they pull apart, blue where together.

    Args:
        maps: ``{(task, other task): (B, N)}``.
        path: where the picture goes.
        images: (B, C, H, W), of any range of numbers: the tokens lie over the image, faded.
        tokens: instead of images, the words of the row, or of every row; as many as the map has tokens, or fewer if the
            rest is padding.
        grid: rows and columns of patches; by default the one of the image's shape. Tokens before those of the grid
            (class, registers) are left out.
        row: which image or sentence.
        worst: how many of the lowest negative tokens get a frame, per pair.

    Raises:
        ValueError: not just one of ``images`` and ``tokens``, or what does not fit the maps.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plot_conflict_map() needs matplotlib: pip install 'dtme-kernels[plot]'") from error
    if (images is None) == (tokens is None):
        raise ValueError("give either images or tokens")
    if not maps:
        raise ValueError("maps must hold at least one pair of tasks")
    if isinstance(worst, bool) or not isinstance(worst, int) or worst < 0:
        raise ValueError(f"worst must be a number of tokens, got {worst!r}")
    shapes = {tuple(values.shape) for values in maps.values()}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 2:
        raise ValueError(f"maps must all be (B, N) of the same batch, got {sorted(shapes)}")
    if not 0 <= row < shape[0]:
        raise ValueError(f"row must be in [0, {shape[0]}), got {row!r}")
    rows = {pair: values[row].double().cpu() for pair, values in maps.items()}
    figure = _over_image(rows, images, grid, row, worst) if tokens is None else _over_words(rows, tokens, row, worst)
    write_beside(Path(path), lambda beside: figure.savefig(beside, dpi=150))


def _lowest(values: Tensor, worst: int) -> list[int]:
    """The tokens to mark: the lowest negative ones."""
    order = values.nan_to_num(math.inf).argsort(stable=True).tolist()
    return [i for i in order[:worst] if values[i] < 0]


def _title(pair: tuple[str, str], values: Tensor) -> str:
    known = values[~values.isnan()]
    share = f"{(known <= 0).double().mean():.0%} of tokens conflict" if len(known) else "no token with both gradients"
    return f"{pair[0]} · {pair[1]}: {share}"


def _colors() -> Any:
    """A diverging map of [-1, 1], and its norm."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(-1, 1), colormaps["RdBu"])


def _color_bar(figure: Any, axes: Any, **place: Any) -> None:
    bar = figure.colorbar(_colors(), **place, ticks=[-1, 0, 1], orientation="horizontal")
    bar.ax.set_xticklabels(["-1, apart", "0", "together, 1"], fontsize=8, color=TEXT)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    bar.set_label("cosine of the two tasks' gradients; framed: the lowest", fontsize=8, color=TEXT)


# --- over an image ----------------------------------------------------------------------------------------------------


def _over_image(
    rows: Mapping[tuple[str, str], Tensor], images: Any, grid: tuple[int, int] | None, row: int, worst: int
) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    picture = _faded(images, row)
    sides = picture.shape[:2]
    height, width = _grid(len(next(iter(rows.values()))), sides, grid)
    columns = min(len(rows), 3 if len(rows) < 7 else 4)
    lines = -(-len(rows) // columns)
    panel = 2.7 if columns > 1 else 4.2
    size = (panel * columns + 0.3, (panel * sides[0] / sides[1] + 0.35) * lines + 0.75)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    step = sides[0] / height, sides[1] / width
    for axes, (pair, values) in zip(panels, rows.items(), strict=False):
        values = values[len(values) - height * width :]
        heat = _colors().to_rgba(values.nan_to_num(0).view(height, width).numpy())
        strength = values.abs().nan_to_num(0).view(height, width).numpy()
        heat[..., 3] = 0.7 * strength**0.7  # where nothing pulls the image is seen
        extent = (0, sides[1], sides[0], 0)
        axes.imshow(picture, extent=extent, interpolation="bilinear")
        axes.imshow(heat, extent=extent, interpolation="nearest")
        for i in _lowest(values, worst):
            corner = (i % width * step[1], i // width * step[0])
            axes.add_patch(Rectangle(corner, step[1], step[0], fill=False, edgecolor=PAPER, linewidth=2.6))
            axes.add_patch(Rectangle(corner, step[1], step[0], fill=False, edgecolor=INK, linewidth=1.2))
        axes.set_title(_title(pair, values).replace(": ", "\n"), fontsize=9, color=TEXT, loc="left")
    for axes in panels:
        axes.set_axis_off()
    _color_bar(figure, panels, ax=list(panels), fraction=0.035, aspect=40, pad=0.02, shrink=0.7)
    return figure


def _faded(images: Any, row: int) -> Any:
    """(H, W, 3) in [0, 1], grey and light, of row ``row`` of (B, C, H, W)."""
    images = torch.as_tensor(images)
    if images.ndim != 4 or not row < len(images):
        raise ValueError(f"images must be (B, C, H, W) of the maps' batch, got {tuple(images.shape)}")
    grey = images[row].double().cpu().mean(0)
    low, high = grey.quantile(0.01), grey.quantile(0.99)
    grey = ((grey - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return (0.35 + 0.6 * grey)[..., None].expand(-1, -1, 3).numpy()


def _grid(num_tokens: int, sides: tuple[int, int], grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is not None:
        height, width = grid
        if not 0 < height * width <= num_tokens:
            raise ValueError(f"grid must have at most the maps' {num_tokens} tokens, got {height} × {width}")
        return height, width
    for leading in range(min(MOST_LEADING, num_tokens - 1) + 1):
        rest = num_tokens - leading
        height = round(math.sqrt(rest * sides[0] / sides[1]))
        if height and rest % height == 0 and abs(rest / height / height - sides[1] / sides[0]) < 0.5 / height:
            return height, rest // height
    raise ValueError(f"{num_tokens} tokens are no grid in the shape of {sides[0]} × {sides[1]} pixels: give grid=")


# --- over a sentence --------------------------------------------------------------------------------------------------

WIDTH, MARGIN, LINE, TITLE, FOOT = 8.0, 0.2, 0.3, 0.36, 0.75
"""Inches: of the picture, around it, per line of words, per title, of the colour bar."""
FONT = 10.5
"""Points."""


def _over_words(rows: Mapping[tuple[str, str], Tensor], tokens: Sequence[Any], row: int, worst: int) -> Any:
    from matplotlib.figure import Figure

    num_tokens = len(next(iter(rows.values())))
    words = _words(tokens, row, num_tokens)
    if any(not values[len(words) :].isnan().all() for values in rows.values()):
        raise ValueError(f"tokens holds {len(words)} words for row {row}, where the maps have values for more")
    known = torch.stack(list(rows.values())).isfinite().any(0).nonzero()
    words = words[: int(known.max()) + 1] if len(known) else words  # without the padding at its end
    places, num_lines = _wrapped(words)
    panel = TITLE + num_lines * LINE + 0.12
    height = len(rows) * panel + FOOT
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    for k, (pair, values) in enumerate(rows.items()):
        top = k * panel
        axes.text(MARGIN, top + TITLE - 0.1, _title(pair, values), fontsize=9, color=TEXT, parse_math=False)
        marked = set(_lowest(values[: len(words)], worst))
        for i, (word, (left, line, width)) in enumerate(zip(words, places, strict=True)):
            _box(axes, word, values[i].item(), (left, top + TITLE + line * LINE, width), i in marked)
    bar = figure.add_axes((0.3, 0.42 / height, 0.4, 0.09 / height))
    _color_bar(figure, axes, cax=bar)
    return figure


def _words(tokens: Sequence[Any], row: int, num_tokens: int) -> list[str]:
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not len(tokens):
        raise ValueError(f"tokens must be the words of a sentence, or of several, got {tokens!r}")
    words = tokens if isinstance(tokens[0], str) else tokens[row] if row < len(tokens) else ()
    if isinstance(words, str) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"tokens must be the words of a sentence, or of several, got {words!r} for row {row}")
    if len(words) > num_tokens:
        raise ValueError(f"tokens holds {len(words)} words for row {row}, the maps have {num_tokens} tokens")
    return list(words)


def _wrapped(words: Sequence[str]) -> tuple[list[tuple[float, int, float]], int]:
    """Where each word's box is: left edge and width in inches, and its line; and how many lines there are."""
    from matplotlib.textpath import TextPath

    places: list[tuple[float, int, float]] = []
    left, line = MARGIN, 0
    for word in words:
        shape = TextPath((0, 0), word.replace("$", "S"), size=FONT)
        width = (float(shape.get_extents().width) if len(shape.vertices) else FONT / 2) / 72 + 0.13
        if left + width > WIDTH - MARGIN and left > MARGIN:
            left, line = MARGIN, line + 1
        places.append((left, line, width))
        left += width + 0.05
    return places, line + 1


def _box(axes: Any, word: str, value: float, place: tuple[float, float, float], is_marked: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, top, width = place
    color, ink = "none", QUIET
    if not math.isnan(value):
        color = _colors().to_rgba(value)
        ink = PAPER if sum(color[:3]) < 1.4 else INK
    axes.add_patch(
        FancyBboxPatch(
            (left, top + 0.03),
            width,
            LINE - 0.08,
            boxstyle="round,pad=0,rounding_size=0.04",
            facecolor=color,
            edgecolor=INK if is_marked else "none",
            linewidth=1.4,
        )
    )
    middle = top + LINE / 2 - 0.01
    axes.text(
        left + width / 2, middle, word, fontsize=FONT, color=ink, ha="center", va="center_baseline", parse_math=False
    )
