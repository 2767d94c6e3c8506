"""NYUD-v2: 795 images of rooms to train on and 654 to validate on; four tasks, laid out as in its multi-task release.

========================  ============================================================================
``images/ID.png``         RGB, 425 × 560
``segmentation/ID.png``   0 unknown, 1 … 40 a class
``depth/ID.npy``          metres, 0 unknown
``normals/ID.png``        the unit normal n as 255 (n + 1) / 2 in three bytes; grey, which is no direction, is unknown
``edge/ID.png``           0 … 255: an edge where it is above half
``gt_sets/train.txt``     ids, one a line; and ``gt_sets/val.txt``
========================  ============================================================================

Images are padded to 448 × 576, which are 28 × 36 patches of 16 pixels.
"""

from pathlib import Path
from types import MappingProxyType

import numpy as np

from .. import losses, metrics
from ..tasks import Task
from .dataset import Data, DataError, Options
from .dense import IMAGE, Tree, open_tree
from .files import Listing, above_half, check_classes, read_array, read_picture, unit_vectors
from .transforms import CLASSES, DEPTH, EDGES, NORMALS

SIZE = (448, 576)
FARTHEST = 100
"""Metres. No room is as deep, and the camera of these images sees ten: larger numbers are of another unit."""
NAMES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf",
    "picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat",
    "clothes", "ceiling", "books", "refrigerator", "television", "paper", "towel", "shower curtain", "box",
    "whiteboard", "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag",
    "other structure", "other furniture", "other prop",
)  # fmt: skip
TASKS = {
    "semseg": Task(
        len(NAMES), losses.cross_entropy, lambda: metrics.MeanIoU(len(NAMES)), "mIoU", "%", False, classes=NAMES
    ),
    "depth": Task(1, losses.depth_loss, lambda: metrics.DepthRMSE(), "RMSE", "m", True),
    "normals": Task(3, losses.normals_loss, lambda: metrics.NormalsError(), "mErr", "°", True, weight=10),
    "edge": Task(1, losses.edge_loss, lambda: metrics.BoundaryF(max_distance=0.011), "odsF", "%", False, weight=50),
}
KINDS = {"semseg": CLASSES, "depth": DEPTH, "normals": NORMALS, "edge": EDGES}


class Nyud(Tree):
    """The files of NYUD-v2."""

    title = "NYUD-v2"
    folder = "NYUDv2"
    folders = MappingProxyType(
        {IMAGE: "images", "semseg": "segmentation", "depth": "depth", "normals": "normals", "edge": "edge"}
    )
    splits = MappingProxyType({"train": "gt_sets/train.txt", "val": "gt_sets/val.txt"})

    def path(self, what: str, id: str, listing: Listing | None = None) -> str:
        return f"{self.folders[what]}/{id}.{'npy' if what == 'depth' else 'png'}"

    def label(self, task: str, id: str) -> np.ndarray:
        path = self.root / self.path(task, id)
        if task == "semseg":
            stored = read_picture(path, "classes")
            check_classes(path, stored, len(NAMES) + 1)
            return stored - np.uint8(1)  # where it is 0 this wraps around to 255, which is ignored
        if task == "normals":
            return unit_vectors(read_picture(path, "vector"), unknown=0)
        if task == "edge":
            return above_half(path, read_picture(path, "grey"))[..., None].astype(np.float32)
        return _metres(path, read_array(path))


def _metres(path: Path, depth: np.ndarray) -> np.ndarray:
    """(H, W, 1) float32 of a stored depth, (H, W)."""
    if depth.ndim != 2:
        raise DataError(f"{path} holds an array of shape {depth.shape}, expected (height, width)")
    if depth.dtype.kind != "f":
        raise DataError(f"{path} holds {depth.dtype}, expected metres as floating-point numbers")
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused
        metres = depth.astype(np.float32)
    wrong = depth[~((metres >= 0) & (metres <= FARTHEST))]
    if wrong.size:
        raise DataError(
            f"{path} holds a depth of {wrong[0]} ({wrong.size} such pixels), "
            f"expected 0 … {FARTHEST} metres, 0 if unknown"
        )
    return metres[..., None]


def open_data(options: Options) -> Data:
    """NYUD-v2 below ``options.root``: see the module.

    Raises:
        ValueError: an option is out of its range.
        DataError: another layout, an empty split, files that are missing.
    """
    return open_tree(Nyud, TASKS, KINDS, SIZE, "nyud", options)
