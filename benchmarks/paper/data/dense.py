"""Data sets of images with dense labels, a file per image and label, in two splits that text files list."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..tasks import Tasks, choose
from .common import index_of
from .dataset import Data, DataError, Item, Options
from .files import (
    Listing,
    check_layout,
    check_options,
    check_same_size,
    named,
    picture_size,
    pixels,
    read_picture,
    read_split,
    refuse_missing,
)
from .transforms import Kinds, eval_transform, generator, train_transform

IMAGE = "image"
"""What the photograph is called among the files of an item."""
GUIDE = "semseg"
"""The task whose label decides which crops are wanted: it is read for training whether or not it is trained."""


class Tree(ABC):
    """The files of a data set below its root. It reads and never writes, and holds nothing that it has read."""

    title: ClassVar[str]
    folder: ClassVar[str]
    """Name of the root where the data set is published."""
    folders: ClassVar[Mapping[str, str]]
    """Where the files of the image and of every task lie."""
    splits: ClassVar[Mapping[str, str]]
    """For "train" and "val", the file that lists the ids."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def path(self, what: str, id: str, listing: Listing | None = None) -> str:
        """The file, relative to the root, of the image or of a task's label; ``listing`` spares a look at the disk."""

    @abstractmethod
    def label(self, task: str, id: str) -> np.ndarray:
        """(H, W) uint8 for classes, else (H, W, C) float32; checked.

        Raises:
            DataError: the file is missing, broken or holds something else.
        """

    def image(self, id: str) -> np.ndarray:
        """(H, W, 3) uint8."""
        return read_picture(self.root / self.path(IMAGE, id), "rgb")


class ImageItems:
    """A split: ``items[index, draw]``, as ``dataset.Items`` has it."""

    def __init__(
        self, tree: Tree, ids: Sequence[str], names: Sequence[str], kinds: Kinds, size: tuple[int, int]
    ) -> None:
        self.tree, self.ids, self.names, self.kinds, self.size = tree, list(ids), tuple(names), kinds, size

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int | None]) -> Item:
        index, draw = index_of(key, len(self)), key[1]
        id = self.ids[index]
        image = self.tree.image(id)
        if draw is None:
            self._check_fits(id, image.shape[:2])
            return eval_transform(image, self._labels(id, image, self.names), self.kinds, self.size)
        labels = self._labels(id, image, dict.fromkeys((*self.names, GUIDE)))
        drawn, tensors = train_transform(image, labels, self.kinds, self.size, generator(draw, index))
        return drawn, {name: tensors[name] for name in self.names}

    def _labels(self, id: str, image: np.ndarray, names: Iterable[str]) -> dict[str, np.ndarray]:
        labels = {name: self.tree.label(name, id) for name in names}
        for name, label in labels.items():
            check_same_size(self._file(name, id), label.shape[:2], self._file(IMAGE, id), image.shape[:2])
        return labels

    def _check_fits(self, id: str, sides: Sequence[int]) -> None:
        if any(have > most for have, most in zip(sides, self.size, strict=True)):
            raise DataError(
                f"{self._file(IMAGE, id)} is {pixels(sides)}, larger than size {pixels(self.size)}: "
                "an evaluation looks at whole images, so choose a size that holds them"
            )

    def check_sizes(self) -> None:
        """Refuse a size that an image does not fit in, by the headers of all images.

        Raises:
            DataError: names the first that does not.
        """
        for id in self.ids:
            self._check_fits(id, picture_size(self._file(IMAGE, id)))

    def _file(self, what: str, id: str) -> Path:
        return self.tree.root / self.tree.path(what, id)


def open_tree(tree: type[Tree], tasks: Tasks, kinds: Kinds, size: tuple[int, int], name: str, options: Options) -> Data:
    """What ``open_data`` of such a data set does.

    Args:
        size: (height, width) of what the model sees, unless the options say otherwise.

    Raises:
        ValueError: an option is out of its range.
        DataError: another layout, an empty split, files that are missing.
    """
    chosen = choose(tasks, options.tasks)
    root, final = check_options(options, tree.title, size)
    needed = {"train": dict.fromkeys((IMAGE, GUIDE, *chosen)), "val": dict.fromkeys((IMAGE, *chosen))}
    folders = dict.fromkeys(f"{tree.folders[what]}/" for what in needed["train"])
    check_layout(root, tree.title, tree.folder, (*folders, *tree.splits.values()))
    files, listing = tree(root), Listing(root)
    ids = {split: read_split(root / path, getattr(options, split)) for split, path in tree.splits.items()}
    both = sorted(set(ids["train"]) & set(ids["val"]))
    if both:
        raise DataError(f"{root / tree.splits['val']} names {named(both)}, which {tree.splits['train']} names too")
    wanted = dict.fromkeys(
        files.path(what, id, listing) for split in ids for id in ids[split] for what in needed[split]
    )
    refuse_missing(root, [path for path in wanted if path not in listing], len(wanted))
    train, val = (ImageItems(files, ids[split], tuple(chosen), kinds, final) for split in ("train", "val"))
    if options.size is not None:
        for items in (train, val):
            items.check_sizes()
    return Data(name, chosen, train, val, final)
