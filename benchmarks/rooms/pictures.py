"""Labels and predictions as pictures: ``decode`` a head's output, ``colorize`` one map, ``sheet`` many."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .labels import CLASSES, IGNORE

FARTHEST = 8.0
"""Depth in metres at the dark end of the scale."""

_DEPTH = colormaps["magma_r"]
_PALETTE = {
    "semseg": (
        "b08d57", "c9cdd2", "f3f1ea", "6fb7e9", "8c5a3c", "d16ba5", "d9a05b",
        "a63d40", "3d6fa8", "6a8f5b", "f2cf4a", "2f7d3b", "e4572e", "17a398", "7a5ca8",
    ),
    "parts": ("f2b134", "b5651d", "5b3a29", "8ed1fc", "1f78b4", "b8e186", "4d9221"),
    "saliency": ("20242c", "f7d154"),
}  # fmt: skip


def palette(task: str) -> np.ndarray:
    """(classes, 3) uint8: the colour of every class of a task that has classes."""
    return np.array([list(bytes.fromhex(code)) for code in _PALETTE[task]], np.uint8)


def decode(task: str, output: np.ndarray) -> np.ndarray:
    """A head's raw output (C, H, W) -> a map like its label: class indices, edge probability, metres, unit normals,
    albedo in [0, 1]."""
    output = np.asarray(output, np.float32)
    if CLASSES[task]:
        return output.argmax(0)
    if task == "edges":
        return 0.5 + 0.5 * np.tanh(output / 2)
    if task == "normals":
        return output / np.maximum(np.sqrt((output**2).sum(0)), 1e-12)
    if task == "albedo":
        return output.clip(0, 1)
    return output


def colorize(task: str, array: np.ndarray) -> np.ndarray:
    """A label, a decoded prediction or an image (task "image") -> (H, W, 3) uint8.

    Class maps (H, W) take their ``palette``, 255 grey; depth (1, H, W) is bright where near, black where invalid;
    normals (3, H, W) show (n_x, -n_y, -n_z), so floors are green and what faces the camera is blue; edges (1, H, W)
    are black on white; albedo (3, H, W) has the display's gamma, as an image.
    """
    array = np.asarray(array)
    if task in _PALETTE:
        colours = np.full((IGNORE + 1, 3), 90, np.uint8)
        colours[: len(CLASSES[task])] = palette(task)
        return colours[array]
    if task == "depth":
        colour = _DEPTH(array[0] / FARTHEST)[..., :3] * (array[0] > 0)[..., None]
    elif task == "edges":
        colour = np.repeat(1 - array.transpose(1, 2, 0), 3, 2)
    elif task == "normals":
        colour = (array.transpose(1, 2, 0) * (1, -1, -1) + 1) / 2
    elif task == "albedo":
        colour = np.sqrt(array.transpose(1, 2, 0).clip(0))
    elif task == "image":
        colour = array.transpose(1, 2, 0)
    else:
        raise ValueError(f"task must be 'image' or one of {', '.join(CLASSES)}, got {task!r}")
    return (colour.clip(0, 1) * 255).round().astype(np.uint8)


def sheet(
    path: str | Path,
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    legend: Sequence[str] = ("semseg", "parts", "depth"),
    panel: float = 1.6,
) -> None:
    """Draw rows of (H, W, 3) uint8 pictures under column titles to a file, with a legend line for each named task.

    ``panel`` is the width of a picture in inches, at 120 dots an inch.
    """
    height = panel * rows[0][0].shape[0] / rows[0][0].shape[1]
    gap, line, top = 0.06, 0.36, 0.3  # inches
    width = len(columns) * (panel + gap) + gap
    below = line * len(legend) + gap
    tall = top + len(rows) * (height + gap) + below
    figure = Figure((width, tall), dpi=120, facecolor="white")
    grid = {"left": gap / width, "right": 1 - gap / width, "top": 1 - top / tall, "bottom": below / tall}
    grid |= {"wspace": gap / panel, "hspace": gap / height}
    panels = figure.subplots(len(rows), len(columns), squeeze=False, gridspec_kw=grid)
    for axes, row in zip(panels, rows, strict=True):
        for axis, picture in zip(axes, row, strict=True):
            axis.imshow(picture, interpolation="nearest", aspect="auto")
            axis.set_axis_off()
    for axis, title in zip(panels[0], columns, strict=True):
        axis.set_title(title, fontsize=9, pad=4)
    for i, task in enumerate(reversed(legend)):
        _legend(figure, task, (i + 0.5) * line / tall, width)
    figure.savefig(path)


def _legend(figure: Figure, task: str, middle: float, width: float) -> None:
    """A line of the legend at height ``middle`` (figure units) of a figure ``width`` inches wide."""
    figure.text(0.1 / width, middle, task, fontsize=8, weight="bold", va="center")
    if task == "depth":
        tall = 0.12 / figure.get_figheight()
        axis = figure.add_axes((0.85 / width, middle, 3.5 / width, tall))
        axis.imshow(np.linspace(0, 1, 256)[None], cmap=_DEPTH, aspect="auto", extent=(0, FARTHEST, 0, 1))
        axis.set_yticks([])
        axis.set_xticks(range(0, int(FARTHEST) + 1, 2), [f"{m} m" for m in range(0, int(FARTHEST) + 1, 2)], fontsize=7)
        axis.tick_params(length=2, pad=1)
        return
    handles = [Patch(facecolor=c / 255, edgecolor="black", lw=0.4) for c in palette(task)]
    figure.legend(
        handles, CLASSES[task], loc="center left", bbox_to_anchor=(0.78 / width, middle), ncols=len(handles),
        fontsize=7, frameon=False, borderpad=0, handlelength=1.1, handleheight=1.1, handletextpad=0.4, columnspacing=1,
    )  # fmt: skip
