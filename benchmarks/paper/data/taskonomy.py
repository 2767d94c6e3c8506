"""Taskonomy, its tiny split: buildings, pictures of 512 × 512, eleven tasks that are each a picture of the same view.

A view of a building is ``FOLDER/taskonomy/BUILDING/VIEW_domain_NAME.png``, with a folder for each task (``STORED``) and
one for the photograph, ``rgb``; what comes before ``_domain_`` says which pictures belong together.
``splits_taskonomy/train_val_test_tiny.csv`` has a row for each building: its name, and under the headings train, val
and test 1 where it belongs to the split, else 0.

Pictures are scaled to 256 × 256, linearly between the pixels' centres (a pixel of half the size is the mean of four),
then their values: the photograph's from 0 … 255 to -1 … 1, the tasks' as ``STORED`` says. Nothing is known where a
depth is stored as 65535 or a normal as grey, nor where such a pixel would be mixed with others: the target is NaN.
Training flips half of the images, which negates the normals' first component; nothing else is drawn.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import losses, metrics
from ..tasks import Task, choose
from .common import index_of
from .dataset import Data, DataError, Item, Options
from .files import (
    Listing,
    check_layout,
    check_names,
    check_options,
    check_same_size,
    named,
    no_direction,
    picture_size,
    pixels,
    read_picture,
    read_table,
    refuse_missing,
)
from .transforms import generator

TITLE = "Taskonomy"
SIZE = (256, 256)
SPLITS = "splits_taskonomy/train_val_test_tiny.csv"
PHOTOGRAPH = "rgb"
FULL = 2**16
UNKNOWN_DEPTH = 65535
CURVATURE_MEAN, CURVATURE_STD = (123.572, 120.1), (31.922, 21.658)
"""Mean and deviation of the two principal curvatures, in stored units."""


def _logarithmic(stored: Tensor) -> Tensor:
    return stored.log1p() / np.log(FULL)


def _byte(stored: Tensor) -> Tensor:
    return stored * (2 / 255) - 1


def _key_points_2d(stored: Tensor) -> Tensor:
    return _share(stored, 0.005)


def _key_points_3d(stored: Tensor) -> Tensor:
    return _share(stored, 1.0)


def _texture(stored: Tensor) -> Tensor:
    return _share(stored, 0.08)


def _share(stored: Tensor, share: float) -> Tensor:
    """From 0 … that share of the full range, where it is clipped, to -1 … 1."""
    return (stored / (share * FULL)).clamp(0, 1) * 2 - 1


def _occlusion(stored: Tensor) -> Tensor:
    return stored / (0.00625 * FULL)


def _curvature(stored: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(2, 1, 1) for values in (CURVATURE_MEAN, CURVATURE_STD))
    return (stored - mean) / std


class Stored(NamedTuple):
    """How the pictures of a task are stored."""

    folder: str
    what: str
    """How their pixels are read: see ``files.read_picture``."""
    channels: int
    scale: Callable[[Tensor], Tensor]
    """From stored values, (C, H, W) float32, to the target."""


STORED = {
    "DE": Stored("depth_euclidean", "grey 16", 1, _logarithmic),
    "DZ": Stored("depth_zbuffer", "grey 16", 1, _logarithmic),
    "EO": Stored("edge_occlusion", "grey 16", 1, _occlusion),
    "ET": Stored("edge_texture", "grey 16", 1, _texture),
    "Key2D": Stored("keypoints2d", "grey 16", 1, _key_points_2d),
    "Key3D": Stored("keypoints3d", "grey 16", 1, _key_points_3d),
    "N": Stored("normal", "vector", 3, _byte),
    "PC": Stored("principal_curvature", "vector", 2, _curvature),
    "R": Stored("reshading", "rgb", 3, _byte),
    "S2D": Stored("segment_unsup2d", "grey", 1, _byte),
    "S25D": Stored("segment_unsup25d", "grey", 1, _byte),
}
"""How the pictures of every task are stored; tasks are named as in the paper's tables."""


def _task(name: str) -> Task:
    channels = STORED[name].channels
    if name == "N":
        return Task(channels, losses.cosine_loss, lambda: metrics.DirectionL1(), "L1", "", True)
    if name == "PC":
        return Task(channels, losses.mse_loss, lambda: metrics.RootMeanSquareError(), "RMSE", "", True)
    return Task(channels, losses.l1_loss, lambda: metrics.L1Error(), "L1", "", True)


TASKS = {name: _task(name) for name in STORED}


class View(NamedTuple):
    """What all pictures of a view have in common."""

    building: str
    name: str


class Pictures:
    """The pictures below a root: which there are, and their pixels. Only ``views`` lists folders."""

    def __init__(self, root: Path, folders: Sequence[str]) -> None:
        self.root, self.folders = root, tuple(folders)
        self._suffixes: dict[tuple[str, str], str] = {}

    def path(self, folder: str, view: View) -> str:
        """Relative to the root."""
        suffix = self._suffixes.get((folder, view.building), f"_domain_{folder}.png")
        return f"{folder}/taskonomy/{view.building}/{view.name}{suffix}"

    def views(self, buildings: Sequence[str], count: int | None, listing: Listing) -> tuple[list[View], list[str]]:
        """The first ``count`` views of these buildings, all for None, and those of their files that are missing."""
        views: list[View] = []
        missing: list[str] = []
        for building in buildings:
            if count is not None and len(views) >= count:
                break
            names = {folder: self._names(folder, building, listing) for folder in self.folders}
            together = sorted(set().union(*names.values()))[: None if count is None else count - len(views)]
            if not together:
                missing.append(f"{PHOTOGRAPH}/taskonomy/{building}/*.png")
            views += [View(building, name) for name in together]
            for folder in self.folders:
                absent = (View(building, name) for name in together if name not in names[folder])
                missing += [self.path(folder, view) for view in absent]
        return views, missing

    def _names(self, folder: str, building: str, listing: Listing) -> set[str]:
        """Names of the views of a building in a folder, whose files must all end alike."""
        directory = f"{folder}/taskonomy/{building}"
        parts = [name.partition("_domain_") for name in listing.names(directory) if name.endswith(".png")]
        suffixes = sorted({mark + domain for _, mark, domain in parts if mark})
        strange = [name for name, mark, _ in parts if not mark]
        if strange or len(suffixes) > 1:
            ends = f"files that end in {named(suffixes)}" if not strange else f"{named(sorted(strange))}"
            raise DataError(
                f"{self.root / directory} holds {ends}, expected VIEW_domain_NAME.png with one NAME for all"
            )
        if suffixes:
            self._suffixes[folder, building] = suffixes[0]
        return {name for name, _, _ in parts}

    def read(self, folder: str, what: str, channels: int, view: View) -> Tensor:
        """(channels, H, W) float32, as stored; NaN where nothing is known."""
        held = read_picture(self.root / self.path(folder, view), what)
        values = held.astype(np.float32)
        if folder.startswith("depth_"):
            values[held == UNKNOWN_DEPTH] = np.nan
        elif folder == "normal":
            values[no_direction(held)] = np.nan
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)[:channels]
        return torch.from_numpy(np.ascontiguousarray(values))


class TaskonomyItems:
    """A split: ``items[index, draw]``, as ``dataset.Items`` has it."""

    def __init__(self, pictures: Pictures, views: Sequence[View], names: Sequence[str], size: tuple[int, int]) -> None:
        self.pictures, self.views, self.names, self.size = pictures, list(views), tuple(names), size

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, key: tuple[int, int | None]) -> Item:
        index, draw = index_of(key, len(self)), key[1]
        view = self.views[index]
        photograph = self.pictures.read(PHOTOGRAPH, "rgb", 3, view)
        self.check_shape(view, photograph.shape[1:])
        labels = {}
        for name in self.names:
            folder, what, channels, scale = STORED[name]
            stored = self.pictures.read(folder, what, channels, view)
            check_same_size(
                self._file(folder, view), stored.shape[1:], self._file(PHOTOGRAPH, view), photograph.shape[1:]
            )
            labels[name] = scale(resize(stored, self.size))
        image = _byte(resize(photograph, self.size))
        if draw is not None and generator(draw, index).random() < 0.5:
            image, labels = flip(image, labels)
        return image, labels

    def check_shape(self, view: View, sides: Sequence[int]) -> None:
        if sides[0] * self.size[1] != sides[1] * self.size[0]:
            path = self._file(PHOTOGRAPH, view)
            raise DataError(
                f"{path} is {pixels(sides)}: it cannot be scaled to size {pixels(self.size)} "
                "without being squeezed, choose a size of the same shape"
            )

    def check_first(self) -> None:
        """Refuse a size of another shape than the first picture, by its header."""
        self.check_shape(self.views[0], picture_size(self._file(PHOTOGRAPH, self.views[0])))

    def _file(self, folder: str, view: View) -> Path:
        return self.pictures.root / self.pictures.path(folder, view)


def resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) to (C, *size), linearly between the pixels' centres."""
    if tuple(values.shape[1:]) == tuple(size):
        return values
    return F.interpolate(values[None], size, mode="bilinear", align_corners=False)[0]


def flip(image: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mirror image, left for right."""
    flipped = {name: label.flip(2) for name, label in labels.items()}
    if "N" in flipped:
        flipped["N"] = flipped["N"] * torch.tensor((-1.0, 1.0, 1.0)).view(3, 1, 1)
    return image.flip(2), flipped


def read_buildings(path: Path) -> dict[str, list[str]]:
    """The buildings of "train" and of "val" in a table of splits, in its order.

    Raises:
        DataError: another heading, a cell that is neither 0 nor 1, a building that is there twice or in two splits, a
            split without any.
    """
    rows = read_table(path)
    heading = [cell.lower() for cell in rows[0]] if rows else []
    splits = ("train", "val", "test")
    if any(heading[1:].count(split) != 1 for split in splits):
        raise DataError(f"{path} must begin with a name and train, val, test, got {', '.join(heading) or 'nothing'}")
    columns = {split: heading.index(split, 1) for split in splits}
    check_names(path, [row[0] for row in rows[1:]], "building")
    for row in rows[1:]:
        flags = [row[at] if at < len(row) else "nothing" for at in columns.values()]
        if not set(flags) <= {"0", "1"} or flags.count("1") > 1:
            raise DataError(f"{path} must put {row[0]} into one split by a 1, 0 in the others, got {', '.join(flags)}")
    buildings = {split: [row[0] for row in rows[1:] if row[columns[split]] == "1"] for split in ("train", "val")}
    for split, chosen in buildings.items():
        if not chosen:
            raise DataError(f"{path} puts no building into {split}: the split is empty")
    return buildings


def open_data(options: Options) -> Data:
    """Taskonomy below ``options.root``: see the module. Validated on the split "val".

    Raises:
        ValueError: an option is out of its range.
        DataError: another layout, an empty split, pictures that are missing.
    """
    chosen = choose(TASKS, options.tasks)
    root, size = check_options(options, TITLE, SIZE)
    folders = (PHOTOGRAPH, *(STORED[name].folder for name in chosen))
    check_layout(root, TITLE, "taskonomy", (*(f"{folder}/taskonomy/" for folder in folders), SPLITS))
    pictures, listing = Pictures(root, folders), Listing(root)
    items, missing = {}, []
    for split, buildings in read_buildings(root / SPLITS).items():
        views, absent = pictures.views(buildings, getattr(options, split), listing)
        items[split] = TaskonomyItems(pictures, views, tuple(chosen), size)
        missing += absent
    refuse_missing(root, missing, len(folders) * sum(map(len, items.values())))
    for split in items.values():
        split.check_first()
    return Data("taskonomy", chosen, items["train"], items["val"], size)
