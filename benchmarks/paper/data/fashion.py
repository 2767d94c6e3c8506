"""Multi-Fashion: two garments of Fashion-MNIST in one picture, the usual small set of multi-task learning.

The root holds Fashion-MNIST's four idx files, compressed by gzip or not. A picture is a canvas of 36 × 36 pixels with
one garment of 28 × 28 at its upper left and another at its lower right; where they overlap, the brighter pixel stays.
"""

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch

from .. import losses, metrics
from ..tasks import Task, choose
from .common import check_counts, check_size, classification, index_of, refuse
from .dataset import Data, DataError, Item, Options
from .images import normalise

GARMENTS = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
KINDS = {"top": (0, 2, 4, 6), "trousers": (1,), "dress": (3,), "shoe": (5, 7, 9), "bag": (8,)}
"""What garments belong together, by their numbers."""
SIDE, CANVAS = 28, 36
"""Pixels along a garment, and along a picture of two."""
SIZE = (40, 40)
"""(height, width) of a picture with its margin, unless told otherwise: patches of 8 pixels tile it."""
FILES = {"train": "train", "val": "t10k"}
"""Which of Fashion-MNIST's files a split is made of."""
TASKS = {
    "top_left": classification(GARMENTS),
    "bottom_right": classification(GARMENTS),
    "same_kind": classification(("different", "same")),
    # the pixels where both garments are, over those where one of them is
    "overlap": Task(1, losses.l1_loss, lambda: metrics.L1Error(), "L1", "", lower_is_better=True, is_dense=False),
}
PAIR = ("top_left", "bottom_right")
"""The tasks of a user who names none."""


def open_data(options: Options) -> Data:
    """As many pictures as Fashion-MNIST has garments, 60,000 and 10,000, or fewer: each garment is once at the upper
    left, and once at the lower right of another one. Labels are numbers: (), int64, and (1,), float32, of the overlap.

    Nothing is drawn for an item: mirrored pictures would show other garments.

    Raises:
        ValueError: no root, an unknown task, a size below 36 pixels, less than 1 item, or an option that means nothing.
        DataError: a file is missing, or holds something else than Fashion-MNIST; the message names it.
    """
    refuse(options, "fashion", "tokenizer")
    check_counts(options)
    size = check_size(options, SIZE, CANVAS)
    tasks = choose(TASKS, PAIR if options.tasks is None else options.tasks)
    if options.root is None:
        raise ValueError("the data set 'fashion' needs its root, the folder of Fashion-MNIST's idx files")
    train, val = (
        Pairs(Path(options.root), split, options.seed, getattr(options, split), size, tuple(tasks)) for split in FILES
    )
    return Data("fashion", tasks, train, val, size)


class Pairs:
    """A split; see ``Items``.

    Raises:
        IndexError: no such picture.
    """

    def __init__(
        self, root: Path, split: str, seed: int, count: int | None, size: tuple[int, int], tasks: tuple[str, ...]
    ) -> None:
        self.images, self.garments = read_garments(root, FILES[split])
        # of all generators, NumPy promises the numbers of this one for good
        key = hashlib.sha256(f"fashion/{split}/{seed}".encode()).digest()
        self.order = np.random.RandomState(np.frombuffer(key, "<u4")).permutation(len(self.garments))
        self.count = min(count or len(self.order), len(self.order))
        self.size, self.tasks = size, tasks

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int | None]) -> Item:
        index = index_of(key, self.count)
        pair = self.order[index], self.order[(index + 1) % len(self.order)]
        canvas = np.zeros((2, CANVAS, CANVAS), np.uint8)
        canvas[0, :SIDE, :SIDE], canvas[1, -SIDE:, -SIDE:] = (self.images[at] for at in pair)
        first, second = (int(self.garments[at]) for at in pair)
        labels = {
            "top_left": lambda: torch.tensor(first),
            "bottom_right": lambda: torch.tensor(second),
            "same_kind": lambda: torch.tensor(int(_kind(first) == _kind(second))),
            "overlap": lambda: torch.tensor([_overlap(canvas)]),
        }
        colour = enlarged(canvas.max(0), self.size).astype(np.float32) / np.float32(255)
        return torch.from_numpy(normalise(np.stack([colour] * 3))), {task: labels[task]() for task in self.tasks}


def _kind(garment: int) -> str:
    return next(kind for kind, garments in KINDS.items() if garment in garments)


def _overlap(canvas: np.ndarray) -> float:
    return float((canvas > 0).all(0).sum() / max((canvas > 0).any(0).sum(), 1))


def enlarged(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A canvas in the middle of a black picture (height, width), as large as whole pixels of it can be."""
    times = min(size) // CANVAS
    large = picture.repeat(times, 0).repeat(times, 1)
    result = np.zeros(size, picture.dtype)
    top, left = ((have - CANVAS * times) // 2 for have in size)
    result[top : top + CANVAS * times, left : left + CANVAS * times] = large
    return result


# --- the files --------------------------------------------------------------------------------------------------------


def read_garments(root: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and garments (n,), uint8.

    Args:
        part: "train" or "t10k".
    """
    images, path = read_idx(root, f"{part}-images-idx3-ubyte", 3)
    garments, path_of_garments = read_idx(root, f"{part}-labels-idx1-ubyte", 1)
    if images.shape[1:] != (SIDE, SIDE):
        raise DataError(f"{path} holds images of {images.shape[1]} × {images.shape[2]} pixels, not of {SIDE} × {SIDE}")
    if len(images) != len(garments):
        raise DataError(f"{path} holds {len(images)} images, and {path_of_garments} {len(garments)} labels")
    if not len(images):
        raise DataError(f"{path} holds no image")
    wrong = np.flatnonzero(garments >= len(GARMENTS))
    if wrong.size:
        raise DataError(
            f"{path_of_garments} holds {wrong.size} labels above {len(GARMENTS) - 1}: the first is "
            f"{garments[wrong[0]]}, of image {wrong[0]}"
        )
    return images, garments


def read_idx(root: Path, name: str, dimensions: int) -> tuple[np.ndarray, Path]:
    """An idx file of bytes, and where it lies: ``name``, else ``name.gz``.

    The format: two zeros, 8 (unsigned bytes), the number of dimensions; each of these, 4 bytes, the highest first; the
    bytes.
    """
    readers: dict[str, Callable[[Path], bytes]] = {name: Path.read_bytes, f"{name}.gz": _decompressed}
    path = next((root / file for file in readers if os.path.isfile(root / file)), None)
    if path is None:
        raise DataError(f"{root / name} is missing, and so is {name}.gz")
    try:
        content = readers[path.name](path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)):
        head = content[:4].hex() or "nothing"
        raise DataError(f"{path} is no idx file of bytes in {dimensions} dimensions: it begins with {head}")
    shape = tuple(int(length) for length in np.frombuffer(content[4:start].ljust(4 * dimensions, b"\0"), ">u4"))
    if len(content) != start + prod(shape):
        lengths = " × ".join(map(str, shape))
        raise DataError(f"{path} is damaged: it has {len(content)} bytes, and {lengths} take {start + prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape), path


def _decompressed(path: Path) -> bytes:
    with gzip.open(path) as file:
        return file.read()
