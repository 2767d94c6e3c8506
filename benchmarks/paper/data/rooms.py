"""The rendered rooms as a data set of the evaluation.

A split is rendered once, on all cores, into a file of the cache: a record for every scene, with its image and all kinds
of labels. It is read through a memory map, so that what several processes read is in memory once.
"""

import hashlib
import os
import random
from collections.abc import Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dtme.files import write_beside

from ... import rooms
from ...rooms.labels import CLASSES
from ...rooms.scenes import MIN_SIDE, Scenes, edges_of, mirrored
from .. import losses, metrics
from ..metrics import DepthRMSE, EdgeF, MaxF, MeanIoU, NormalsError
from ..tasks import Task, choose
from .common import check_counts, check_size, refuse
from .dataset import Data, DataError, Item, Options
from .images import normalise

TASKS = {
    "semseg": Task(
        len(CLASSES["semseg"]),
        losses.cross_entropy,
        lambda: MeanIoU(len(CLASSES["semseg"])),
        "mIoU",
        "%",
        lower_is_better=False,
        classes=CLASSES["semseg"],
    ),
    "depth": Task(1, losses.depth_loss, DepthRMSE, "RMSE", "m", lower_is_better=True),
    "normals": Task(3, losses.normals_loss, NormalsError, "mErr", "°", lower_is_better=True, weight=10),
    # at 64 × 64 a tolerance of one pixel covers half the image; and the loss weighs edges 19 : 1, so that a probability
    # of 0.5 stands for an edge that is one in twenty times
    "edges": Task(
        1,
        losses.edge_loss,
        lambda: EdgeF(tolerance=0, threshold=0.8),
        "F",
        "%",
        lower_is_better=False,
        weight=50,
    ),
    "saliency": Task(
        len(CLASSES["saliency"]),
        losses.balanced_cross_entropy,
        MaxF,
        "maxF",
        "%",
        lower_is_better=False,
        classes=CLASSES["saliency"],
        weight=5,
    ),
    "parts": Task(
        len(CLASSES["parts"]),
        losses.cross_entropy,
        lambda: MeanIoU(len(CLASSES["parts"])),
        "mIoU",
        "%",
        lower_is_better=False,
        classes=CLASSES["parts"],
        weight=2,
    ),
    # of linear red, green and blue in [0, 1]; every pixel has it
    "albedo": Task(3, losses.l1_loss, lambda: metrics.L1Error(), "L1", "", lower_is_better=True),
}
DEMO_TASKS = ("semseg", "depth", "normals", "edges")
"""Those of a user who names none."""
SIZE, TRAIN, VAL = (64, 64), 2000, 250
_CHUNK = 50 * 64 * 64
"""Pixels that a process renders at once."""
_STORED: dict[str, tuple[str, tuple[int, ...]]] = {
    "image": ("<f4", (3,)),
    "depth": ("<f4", (1,)),
    "normals": ("<f4", (3,)),
    "albedo": ("<f4", (3,)),
    "semseg": ("u1", ()),
    "saliency": ("u1", ()),
    "parts": ("u1", ()),
    "borders": ("u1", (2,)),
}
"""What the file holds of a scene: number format and channels. Nothing is lost by it."""


def open_data(options: Options) -> Data:
    """Rooms of any size: 2000 for training and 250 for validation, the demo's four tasks, unless told otherwise.

    An item that is drawn is mirrored, left for right, or not; one that is not drawn is as it was rendered.

    Raises:
        ValueError: an unknown task, a size below 16 pixels, less than 1 scene, or an option that means nothing.
        DataError: a file in the cache is damaged or cannot be written.
    """
    refuse(options, "rooms", "root", "tokenizer")
    check_counts(options)
    size = check_size(options, SIZE, MIN_SIDE)
    tasks = choose(TASKS, DEMO_TASKS if options.tasks is None else options.tasks)
    folder, kinds = Path(options.cache).absolute(), tuple(_STORED)[1:]
    train, val = (
        Rooms(_rendered(Scenes(count, size, options.seed, split, kinds), folder), tuple(tasks))
        for split, count in (("train", options.train or TRAIN), ("val", options.val or VAL))
    )
    return Data("rooms", tasks, train, val, size)


class Rooms:
    """A split. Items are read when they are asked for; see ``Items``.

    Raises:
        IndexError: no such scene.
    """

    def __init__(self, path: Path, tasks: Sequence[str]) -> None:
        self.path, self.tasks = path, tuple(tasks)

    @cached_property
    def _records(self) -> np.ndarray:
        return _mapped(self.path)

    def __getstate__(self) -> dict[str, Any]:
        """Without the map: another process maps the file itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_records"}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: tuple[int, int | None]) -> Item:
        index, draw = key
        images, labels = self.batch([index], [draw is not None and random.Random(f"{draw}/{index}").random() < 0.5])
        return images[0], {task: label[0] for task, label in labels.items()}

    def batch(self, indices: Sequence[int], mirror: Sequence[bool] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Scenes stacked: normalised images (n, 3, H, W) float32, and labels as ``rooms.scenes`` has them.

        Args:
            mirror: which are seen in a mirror, left for right; None for none.
        """
        at, turned = np.asarray(indices, np.int64), np.zeros(len(indices), bool)
        if mirror is not None:
            turned[:] = mirror
        outside = at[(at < 0) | (at >= len(self))]
        if outside.size:
            raise IndexError(f"index must be in [0, {len(self)}), got {outside[0]}")

        def read(kind: str) -> np.ndarray:
            array = self._records[kind][at]
            array[turned] = mirrored(array[turned]) if kind == "borders" else array[turned][..., ::-1]
            return array

        labels = {}
        for task in self.tasks:
            label = edges_of(read("borders")) if task == "edges" else read(task)
            if task == "normals":
                label[turned, 0] *= -1
            labels[task] = torch.from_numpy(label.astype(np.int64) if CLASSES[task] else label)
        return torch.from_numpy(normalise(read("image"))), labels


# --- the cache --------------------------------------------------------------------------------------------------------


@cache
def renderer(folder: Path = Path(rooms.__file__).parent) -> str:
    """Twelve digits that change with the code that renders, and with what is kept of a scene."""
    digest = hashlib.sha256(repr(_STORED).encode())
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _rendered(scenes: Scenes, folder: Path) -> Path:
    """The file of a split, which is rendered if it is not there.

    Processes that find none at the same time render it each, and the last one's file, which is the same, stays.
    """
    height, width = scenes.size
    name = f"rooms-{height}x{width}-seed-{scenes.seed}-{scenes.split}-{len(scenes)}-{renderer()}.npy"
    path = folder / name
    if not path.exists():
        try:
            write_beside(path, lambda beside: _render(scenes, beside))
        except OSError as error:
            raise DataError(f"{path} could not be written: {error}. The option cache names another folder") from error
    records = _mapped(path)
    if records.shape != (len(scenes),) or records.dtype != _record(scenes.size):
        raise DataError(f"{path} is damaged: it holds {records.shape} of {records.dtype}. Remove it to render it again")
    return path


def _record(size: tuple[int, int]) -> np.dtype:
    return np.dtype([(kind, number, (*channels, *size)) for kind, (number, channels) in _STORED.items()])


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}. Remove it to render it again") from error


def _render(scenes: Scenes, path: Path) -> None:
    """Written piece by piece, not through a map, which would end the process where the disk is full."""
    record = _record(scenes.size)
    together = max(1, _CHUNK // (scenes.size[0] * scenes.size[1]))
    chunks = DataLoader(
        scenes,
        together,
        num_workers=min(16, os.cpu_count() or 1) if len(scenes) > together else 0,
        collate_fn=partial(_packed, record),
        generator=torch.Generator(),  # the loader draws a seed, and not from the numbers of whoever opens this
    )
    header = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (len(scenes),)}
    with path.open("wb") as file, tqdm(total=len(scenes), desc=f"rendering {scenes.split:5}", unit="scene") as bar:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(chunk.numpy().tobytes())
            bar.update(len(chunk))


def _packed(record: np.dtype, items: Sequence[Item]) -> Tensor:
    """Scenes as the file has them, (n, bytes of a scene) uint8: what processes have to hand over is smaller so."""
    records = np.empty(len(items), record)
    for row, (image, labels) in zip(records, items, strict=True):
        for kind, values in {"image": image, **labels}.items():
            row[kind] = values.numpy()
    return torch.from_numpy(records.view(np.uint8).reshape(len(items), -1))
