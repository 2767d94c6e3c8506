"""The embedded data set: furnished rooms, ray-cast, with exact labels for every task of ``labels.CLASSES``.

Labels are those of the pixel's centre. With (H, W) the size, one scene is

============  =================  ====================================================================================
image         (3, H, W) float32  RGB in [0, 1], display gamma
semseg        (H, W) int64       ``labels.SEMSEG``; every pixel has a class
depth         (1, H, W) float32  z-depth in metres: along the optical axis, not along the ray
normals       (3, H, W) float32  unit, camera frame (x right, y down, z forward): a wall faced squarely has (0, 0, -1)
edges         (1, H, W) float32  1 where the pixel to the right or below lies on another solid or across a crease
saliency      (H, W) int64       1 on the one object that draws the eye: large, central, of an eye-catching kind
parts         (H, W) int64       ``labels.PARTS``; 255 off the furniture
albedo        (3, H, W) float32  the surface's own red, green and blue in [0, 1], without any light: linear, so that
                                 its square root is what a picture shows
borders       (2, H, W) uint8    no task, but what edges are made of (``edges_of``): 1 where the pixel to the right
                                 lies on another solid or across a crease; the same of the pixel below
============  =================  ====================================================================================
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batch import Batch, pack
from .labels import CLASSES
from .raycast import Hit, dot, inspect
from .rooms import Room, furnished_room
from .shading import clip, shade

SPLITS = ("train", "val")
LABELS = (*CLASSES, "borders")
MIN_SIDE = 16
_RAYS = 32768  # rendered together: 128 KB an array, which stays in the cache
_SAMPLES = ((-0.36, -0.21), (0.36, -0.21), (0.0, 0.4))  # of a pixel that an edge crosses, besides its centre


class View(NamedTuple):
    """What B × N rays of a camera see."""

    hit: Hit
    ids: np.ndarray  # (3, B, N) int64: class, part, object number
    colour: np.ndarray  # (3, B, N) in [0, 1], display gamma
    albedo: np.ndarray  # (3, B, N), linear
    lit: np.ndarray  # (B, N) bool: whether the light that casts shadows arrives


def _look_at(batch: Batch, x: np.ndarray, y: np.ndarray, size: tuple[int, int], sharp: float = 1.0) -> View:
    """Cast rays through image points x, y (B or 1, N), in pixels.

    ``sharp``: rays per pixel along an axis, for the texture's detail.
    """
    height, width = size
    scale = batch.reach * (2 / max(size))  # metres a pixel at one metre
    right, down, forward = batch.axes
    direction = right * ((x - width / 2) * scale) + down * ((y - height / 2) * scale) + forward
    hit = inspect(batch.solids, batch.eye, direction)
    scenes = np.arange(len(batch.appeal))[:, None]
    row = (hit.solid * np.int64(3) + hit.band) * len(batch.appeal) + scenes
    ids = batch.ids.take(row, axis=1)
    slope = dot(hit.normal, direction)
    slope = np.sqrt(np.maximum(slope * slope / dot(direction, direction), 0.01))
    # a pixel covers 1/slope times more along the face than across; its geometric mean keeps floors crisp
    foot = hit.t * scale / (np.sqrt(slope) * sharp)
    look, number = batch.looks.take(row, axis=1), ids[2].astype(np.int16)
    return View(hit, ids, *shade(hit, look, number, direction, foot, batch.solids, batch.light, batch.bodies))


def _smooth(batch: Batch, image: np.ndarray, rough: np.ndarray, size: tuple[int, int]) -> None:
    """Replace the pixels ``rough`` (B, H·W) of ``image`` (3, B, H·W) by the mean of four samples, in place."""
    count = int(rough.sum(1).max())
    if not count:
        return
    # every scene's list is filled up to the longest with pixels that need nothing
    order = np.argsort(~rough, axis=1, kind="stable")[:, :count]
    y, x = (at.astype(np.float32) + 0.5 for at in np.divmod(order, size[1]))
    x, y = (np.concatenate(at, 1) for at in zip(*((x + dx, y + dy) for dx, dy in _SAMPLES), strict=True))
    colour = _look_at(batch, x, y, size, sharp=2.0).colour
    scenes = np.arange(len(order))[:, None]
    centre = image[:, scenes, order]
    a, b, c = colour.reshape(3, len(order), 3, count).transpose(2, 0, 1, 3)
    image[:, scenes, order] = np.where(rough[scenes, order], (centre + a + b + c) * 0.25, centre)


def _borders(values: np.ndarray) -> np.ndarray:
    """(B, H, W) -> (B, 2, H, W) uint8: whether a pixel differs from its right, and from its lower neighbour."""
    borders = np.zeros((len(values), 2, *values.shape[1:]), np.uint8)
    borders[:, 0, :, :-1] = values[:, :, 1:] != values[:, :, :-1]
    borders[:, 1, :-1] = values[:, 1:] != values[:, :-1]
    return borders


def _beside(borders: np.ndarray) -> np.ndarray:
    """Whether a pixel differs from any of its four neighbours, (B, H, W) bool."""
    beside = borders.any(1)
    beside[:, :, 1:] |= borders[:, 0, :, :-1] > 0
    beside[:, 1:] |= borders[:, 1, :-1] > 0
    return beside


def edges_of(borders: np.ndarray) -> np.ndarray:
    """Label "borders" (..., 2, H, W) -> label "edges" (..., 1, H, W)."""
    return borders.max(-3, keepdims=True).astype(np.float32)


def mirrored(borders: np.ndarray) -> np.ndarray:
    """Label "borders" of the mirror image, left for right.

    A border between two columns is marked in the left one, and so it moves by a pixel in the mirror.
    """
    mirrored = np.ascontiguousarray(borders[..., ::-1])
    mirrored[..., 0, :, :-1] = borders[..., 0, :, -2::-1]
    mirrored[..., 0, :, -1] = 0
    return mirrored


def _salient(ids: np.ndarray, appeal: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(B, H·W) bool: the object with the largest appeal × √(its pixels, central ones counting more)."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    y, x = (2 * y + 1) / height - 1, (2 * x + 1) / width - 1
    weight = np.maximum(1 - 0.6 * (x * x + y * y), 0.05).reshape(-1)
    count = appeal.shape[1]
    mask = np.empty(ids.shape, bool)
    for objects, row, out in zip(ids, appeal, mask, strict=True):
        score = np.sqrt(np.bincount(objects, weight, count)) * row
        best = score.argmax()
        np.equal(objects, best if score[best] > 0 else -1, out=out)
    return mask


def _render(rooms: Sequence[Room], size: tuple[int, int]) -> dict[str, np.ndarray]:
    height, width = size
    batch = pack(rooms)
    x = np.tile(np.arange(width, dtype=np.float32) + 0.5, height)[None]
    y = np.repeat(np.arange(height, dtype=np.float32) + 0.5, width)[None]
    hit, ids, image, albedo, lit = _look_at(batch, x, y, size)
    borders = _borders((hit.solid * np.int16(8) + hit.face).reshape(-1, *size))  # a number for every smooth face
    rough = _beside(borders) | _beside(_borders(lit.reshape(-1, *size)))
    _smooth(batch, image, rough.reshape(len(rooms), -1), size)
    corner = ((x - width / 2) ** 2 + (y - height / 2) ** 2) / max(size) ** 2
    image *= 1 - 0.35 * corner  # the lens darkens the corners
    normals = np.stack([dot(hit.normal, axis) for axis in batch.axes])
    shape = (len(rooms), -1, height, width)
    return {
        "image": image.swapaxes(0, 1).reshape(shape),
        "semseg": ids[0].reshape(-1, *size),
        "depth": hit.t.reshape(shape),
        "normals": normals.swapaxes(0, 1).reshape(shape),
        "edges": edges_of(borders),
        "saliency": _salient(ids[2], batch.appeal, size).astype(np.int64).reshape(-1, *size),
        "parts": ids[1].reshape(-1, *size),
        "albedo": clip(albedo).swapaxes(0, 1).reshape(shape),
        "borders": borders,
    }


def render(
    indices: Sequence[int], size: tuple[int, int] = (64, 64), seed: int = 0, split: str = "train"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Render scenes: images (n, 3, H, W) and all ``LABELS``, stacked.

    A scene's bits depend on its index, ``size``, ``seed`` and ``split`` alone: not on what is rendered with it.
    """
    indices = [int(i) for i in indices]
    _check(size, split, CLASSES)
    step = max(1, _RAYS // (size[0] * size[1]))
    chunks = []
    for first in range(0, len(indices), step):
        rooms = [furnished_room(f"{split}/{seed}/{index}") for index in indices[first : first + step]]
        chunks.append(_render(rooms, tuple(size)))
    if not chunks:
        raise ValueError("indices must name at least one scene")
    out = {k: torch.from_numpy(np.concatenate([c[k] for c in chunks])) for k in chunks[0]}
    return out.pop("image"), out


def _check(size: Sequence[int], split: str, tasks: Iterable[str]) -> None:
    if len(size) != 2 or min(size) < MIN_SIDE:
        raise ValueError(f"size must be (height, width), each at least {MIN_SIDE}, got {tuple(size)}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    unknown = [task for task in tasks if task not in LABELS]
    if unknown:
        raise ValueError(f"tasks must be among {', '.join(LABELS)}, got {', '.join(map(repr, unknown))}")


class Scenes(Dataset):
    """``length`` scenes of a split; item i is (image, {task: label}), shapes above.

    Args:
        length: number of scenes, ≥ 0.
        size: (H, W), each ≥ 16; need not be square or even.
        seed: another seed, other scenes.
        split: "train" or "val"; they share no scene, whatever the seeds.
        tasks: the labels to return, a selection of ``LABELS``.

    Raises:
        ValueError: an argument is out of its range; the message names it. IndexError: no such scene.
    """

    def __init__(
        self,
        length: int,
        size: tuple[int, int] = (64, 64),
        seed: int = 0,
        split: str = "train",
        tasks: Sequence[str] = tuple(CLASSES),
    ) -> None:
        if length < 0:
            raise ValueError(f"length must be at least 0, got {length}")
        _check(size, split, tasks)
        self.length, self.size, self.seed, self.split, self.tasks = length, tuple(size), seed, split, tuple(tasks)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """A batch at once, which torch's loader asks for and which renders faster than its items do one by one."""
        outside = [i for i in indices if not 0 <= i < self.length]
        if outside:
            raise IndexError(f"index must be in [0, {self.length}), got {outside[0]}")
        images, labels = render(indices, self.size, self.seed, self.split)
        return [(image, {task: labels[task][i] for task in self.tasks}) for i, image in enumerate(images)]
