"""Labels and predictions as pictures: ``decode`` a head's output, ``colorize`` one map, ``sheet`` many."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .tasks import IGNORE, SALIENCY, TASKS

FARTHEST = 8.0
"""Depth in metres at the dark end of the depth scale."""

_PALETTE = {
    "semseg": "b08d57 c9cdd2 f3f1ea 6fb7e9 8c5a3c d16ba5 d9a05b a63d40 3d6fa8 6a8f5b f2cf4a 2f7d3b e4572e 17a398 7a5ca8",
    "parts": "f2b134 b5651d 5b3a29 8ed1fc 1f78b4 b8e186 4d9221",
    "saliency": "20242c f7d154",
}


def palette(task: str) -> np.ndarray:
    """(classes, 3) uint8: the colour of every class of a task that has classes."""
    return np.array([list(bytes.fromhex(code)) for code in _PALETTE[task].split()], np.uint8)


def decode(task: str, output: np.ndarray) -> np.ndarray:
    """A head's raw output (C, H, W) -> a map as its label has it: class indices, edge probability, metres, unit normals."""
    output = np.asarray(output, np.float32)
    if TASKS[task].classes:
        return output.argmax(0)
    if task == "edges":
        return 1 / (1 + np.exp(-output))
    if task == "normals":
        return output / np.maximum(np.sqrt((output**2).sum(0, keepdims=True)), 1e-12)
    return output


def colorize(task: str, array: np.ndarray) -> np.ndarray:
    """A label, a decoded prediction or an image -> (H, W, 3) uint8.

    Class maps (H, W) by ``palette``, 255 grey; depth (1, H, W) near is bright, invalid black; normals (3, H, W) as
    (n_x, -n_y, -n_z) from [-1, 1]; edges (1, H, W) black on white; ``task`` "image" (3, H, W) in [0, 1].
    """
    array = np.asarray(array)
    if task in _PALETTE:
        colours = np.full((256, 3), 90, np.uint8)
        colours[: TASKS[task].channels] = palette(task)
        return colours[np.minimum(array, IGNORE)]
    if task == "depth":
        from matplotlib import colormaps

        metres = array.reshape(array.shape[-2:])
        colour = colormaps["magma_r"](np.clip(metres / FARTHEST, 0, 1))[..., :3] * (metres > 0)[..., None]
    elif task == "edges":
        colour = np.repeat(1 - array.reshape(*array.shape[-2:], 1), 3, 2)
    elif task == "normals":
        colour = (array * np.array([1, -1, -1]).reshape(3, 1, 1)).transpose(1, 2, 0) / 2 + 0.5
    elif task == "image":
        colour = array.transpose(1, 2, 0)
    else:
        raise ValueError(f"task must be 'image' or one of {', '.join(TASKS)}, got {task!r}")
    return (np.clip(colour, 0, 1) * 255).round().astype(np.uint8)


def sheet(
    path: str | Path,
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    row_titles: Sequence[str] = (),
    title: str = "",
    legend: Sequence[str] = ("semseg", "parts", "depth"),
    panel: float = 1.6,
) -> None:
    """Draw rows of (H, W, 3) uint8 pictures under column titles, and a legend for the named tasks, to a file.

    ``panel``: width of a picture in inches, at 120 dots an inch.
    """
    from matplotlib.figure import Figure

    height, width = rows[0][0].shape[:2]
    # inches: a margin for row titles, a strip for the titles on top and one for every legend below
    left, top, strip = (0.9 if row_titles else 0.1), (0.65 if title else 0.35), 0.42
    cell = panel, panel * height / width
    size = left + len(columns) * (panel + 0.06) + 0.1, top + len(rows) * (cell[1] + 0.06) + strip * len(legend) + 0.1
    figure = Figure(size, dpi=120, facecolor="white")
    for r, row in enumerate(rows):
        bottom = size[1] - top - (r + 1) * (cell[1] + 0.06)
        for c, picture in enumerate(row):
            x = left + c * (panel + 0.06)
            axes = figure.add_axes((x / size[0], bottom / size[1], cell[0] / size[0], cell[1] / size[1]))
            axes.imshow(picture, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            if r == 0:
                axes.set_title(columns[c], fontsize=9, pad=4)
        if row_titles:
            figure.text((left - 0.08) / size[0], (bottom + cell[1] / 2) / size[1], row_titles[r], fontsize=8, ha="right", va="center")
    if title:
        figure.text(0.5, 1 - 0.12 / size[1], title, fontsize=11, ha="center", va="top")
    for line, task in enumerate(legend):
        _legend(figure, task, (left / size[0], strip * (len(legend) - line - 0.7) / size[1], 1 - (left + 0.1) / size[0], 0.2 / size[1]))
    figure.savefig(path)


def _legend(figure, task: str, where: tuple[float, float, float, float]) -> None:
    """One line in the figure's rectangle ``where``: colour swatches and class names, or the depth scale."""
    axes = figure.add_axes(where)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if task == "depth":
        axes.set_position([where[0] + where[2] * 0.09, where[1] + where[3] * 0.4, where[2] * 0.4, where[3] * 0.6])
        axes.imshow(np.linspace(0, 1, 256)[None], cmap="magma_r", aspect="auto", extent=(0, FARTHEST, 0, 1))
        axes.set_xticks(range(0, int(FARTHEST) + 1, 2), [f"{m} m" for m in range(0, int(FARTHEST) + 1, 2)], fontsize=7)
        figure.text(where[0], where[1] + where[3] / 2, task, fontsize=8, va="center", weight="bold")
        return
    names = TASKS[task].classes or SALIENCY
    axes.set_xlim(-1.4, max(len(names), 12))
    axes.set_ylim(0, 1)
    axes.set_xticks([])
    axes.text(-1.4, 0.5, task, fontsize=8, va="center", weight="bold")
    for i, (name, colour) in enumerate(zip(names, palette(task) / 255, strict=True)):
        axes.add_patch(__import__("matplotlib.patches").patches.Rectangle((i, 0.1), 0.22, 0.8, color=colour, ec="black", lw=0.4))
        axes.text(i + 0.28, 0.5, name, fontsize=7, va="center")
