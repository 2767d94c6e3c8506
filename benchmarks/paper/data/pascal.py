"""PASCAL-Context: 4,998 images to train on and 5,105 to validate on; five tasks, as their multi-task release has them.

====================================  =================================================================================
``JPEGImages/ID.jpg``                 RGB, at most 500 × 500
``semseg/VOC12/ID.png``               0 background, 1 … 20 a class, 255 unknown; where it is missing,
                                      ``semseg/pascal-context/ID.png``
``human_parts/ID.mat``                a struct ``anno`` of objects with their masks, and masks of their parts
``sal_distill/ID.png``                salient where above 127.5
``normals_distill/ID.png``            the unit normal n as 255 (n + 1) / 2 in three bytes; grey is unknown
``pascal-context/trainval/ID.mat``    ``LabelMap``, a number for each class of the scene
``ImageSets/Context/train.txt``       ids, one a line; and ``ImageSets/Context/val.txt``
====================================  =================================================================================

Images are padded to 512 × 512. Parts are those of persons, left and right together; an image or crop without any has
unknown parts throughout. An edge is where the Laplacian of ``LabelMap`` is not zero, thinned to a line.

Normals count wherever they are stored. (Some of the published code leaves out those of objects that NYUD-v2, which they
were distilled from, does not know, by lists of names that are no part of this layout.)
"""

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.morphology import thin

from ...rooms.labels import IGNORE
from .. import losses, metrics
from ..tasks import Task
from .dataset import Data, DataError, Options
from .dense import GUIDE, IMAGE, Tree, open_tree
from .files import Listing, above_half, check_classes, check_same_size, picture_size, read_picture, unit_vectors
from .matlab import read_mat
from .transforms import CLASSES, EDGES, NORMALS, PARTS

SIZE = (512, 512)
NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
PERSON = NAMES.index("person")
PART_NAMES = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
_STORED_PARTS = {
    "head": ("head", "hair", "nose", "mouth", "lear", "rear", "leye", "reye", "lebrow", "rebrow"),
    "torso": ("torso", "neck"),
    "upper arm": ("luarm", "ruarm"),
    "lower arm": ("llarm", "rlarm", "lhand", "rhand"),
    "upper leg": ("luleg", "ruleg"),
    "lower leg": ("llleg", "rlleg", "lfoot", "rfoot"),
}
_PART_OF = {stored: PART_NAMES.index(name) for name, parts in _STORED_PARTS.items() for stored in parts}
"""What a person's part is called in ``anno``, and its class."""
TASKS = {
    "semseg": Task(
        len(NAMES), losses.cross_entropy, lambda: metrics.MeanIoU(len(NAMES)), "mIoU", "%", False, classes=NAMES
    ),
    "parts": Task(
        len(PART_NAMES),
        losses.cross_entropy,
        lambda: metrics.MeanIoU(len(PART_NAMES)),
        "mIoU",
        "%",
        False,
        classes=PART_NAMES,
        weight=2,
    ),
    "saliency": Task(
        2,
        losses.balanced_cross_entropy,
        lambda: metrics.MaxF(),
        "maxF",
        "%",
        False,
        classes=("background", "salient"),
        weight=5,
    ),
    "normals": Task(3, losses.normals_loss, lambda: metrics.NormalsError(), "mErr", "°", True, weight=10),
    "edge": Task(1, losses.edge_loss, lambda: metrics.BoundaryF(max_distance=0.0075), "odsF", "%", False, weight=50),
}
KINDS = {"semseg": CLASSES, "parts": PARTS, "saliency": CLASSES, "normals": NORMALS, "edge": EDGES}


_SUFFIXES = {IMAGE: "jpg", "parts": "mat", "edge": "mat"}
"""Suffixes of the files that are no PNG."""


class Pascal(Tree):
    """The files of PASCAL-Context."""

    title = "PASCAL-Context"
    folder = "PASCALContext"
    folders = MappingProxyType(
        {
            IMAGE: "JPEGImages",
            "semseg": "semseg",
            "parts": "human_parts",
            "saliency": "sal_distill",
            "normals": "normals_distill",
            "edge": "pascal-context/trainval",
        }
    )
    splits = MappingProxyType({"train": "ImageSets/Context/train.txt", "val": "ImageSets/Context/val.txt"})

    def path(self, what: str, id: str, listing: Listing | None = None) -> str:
        if what != "semseg":
            return f"{self.folders[what]}/{id}.{_SUFFIXES.get(what, 'png')}"
        first, second = (f"{self.folders[what]}/{kind}/{id}.png" for kind in ("VOC12", "pascal-context"))
        has = listing.__contains__ if listing is not None else lambda path: (self.root / path).is_file()
        return second if has(second) and not has(first) else first

    def label(self, task: str, id: str) -> np.ndarray:
        path = self.root / self.path(task, id)
        if task == GUIDE:
            classes = read_picture(path, "classes")
            check_classes(path, classes, len(NAMES), IGNORE)
            return classes
        if task == "saliency":
            return above_half(path, read_picture(path, "grey")).astype(np.uint8)
        if task == "normals":
            return unit_vectors(read_picture(path, "vector"), unknown=0)
        if task == "edge":
            return edges_of(_map(path, read_mat(path, "LabelMap"), "LabelMap"))
        return self._parts(id)

    def _parts(self, id: str) -> np.ndarray:
        """The classes of ``PART_NAMES``; where parts overlap, the last of the file."""
        path = self.root / self.path("parts", id)
        image = self.root / self.path(IMAGE, id)
        labels = np.zeros(picture_size(image), np.uint8)
        for mask, part in _person_parts(path, read_mat(path, "anno")):
            check_same_size(path, mask.shape, image, labels.shape)
            labels[mask] = part
        return labels


def _person_parts(path: Path, anno: Any) -> Iterator[tuple[np.ndarray, int]]:
    """Mask, (H, W) bool, and class of every part of every person, in the order of the file."""
    for scene in _structs(path, anno, "anno", ("objects",)):
        for thing in _structs(path, scene["objects"], "anno.objects", ("class_ind", "parts")):
            kind = np.asarray(thing["class_ind"])
            if kind.size != 1 or kind.dtype.kind not in "iuf":
                raise DataError(f"{path} holds no number in anno.objects.class_ind, got {thing['class_ind']!r}")
            if kind.item() != PERSON:
                continue
            for part in _structs(path, thing["parts"], "anno.objects.parts", ("part_name", "mask")):
                name = part["part_name"]
                if not isinstance(name, str) or name not in _PART_OF:
                    raise DataError(f"{path} holds a person's part {name!r}, expected one of {', '.join(_PART_OF)}")
                yield _map(path, part["mask"], f"the mask of {name}") != 0, _PART_OF[name]


def _structs(path: Path, value: Any, name: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """An array of structs that have these fields; an empty array of any kind holds none."""
    if isinstance(value, np.ndarray) and value.size == 0:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) and item.keys() >= set(fields) for item in value):
        raise DataError(f"{path} holds no struct {name} with the fields {', '.join(fields)}")
    return value


def _map(path: Path, value: Any, name: str) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind not in "biuf":
        held = f"shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(f"{path}: {name} is no array of numbers with two dimensions, got {held}")
    if not np.isfinite(value).all():
        raise DataError(f"{path}: {name} holds {int((~np.isfinite(value)).sum())} numbers that are NaN or infinite")
    return value


def edges_of(label_map: np.ndarray) -> np.ndarray:
    """(H, W) numbers -> (H, W, 1) float32, 1 on edges: the Laplacian of four neighbours, mirrored at the border without
    its outermost pixels, where it is not zero, thinned to lines of one pixel."""
    laplacian = ndimage.laplace(label_map.astype(np.float64), mode="mirror")
    return thin(laplacian != 0).astype(np.float32)[..., None]


def open_data(options: Options) -> Data:
    """PASCAL-Context below ``options.root``: see the module.

    Raises:
        ValueError: an option is out of its range.
        DataError: another layout, an empty split, files that are missing.
    """
    return open_tree(Pascal, TASKS, KINDS, SIZE, "pascal", options)
