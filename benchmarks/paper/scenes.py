"""The embedded data set: furnished rooms, ray-cast, with exact labels for every task of ``tasks.TASKS``.

Labels are those of the pixel's centre. With (H, W) the size, one scene is

============  =================  ==================================================================================
image         (3, H, W) float32  RGB in [0, 1], display gamma
semseg        (H, W) int64       ``tasks.SEMSEG``; every pixel has a class
depth         (1, H, W) float32  z-depth in metres: along the optical axis, not along the ray
normals       (3, H, W) float32  unit, camera frame: x right, y down, z forward; a wall seen frontally has (0, 0, -1)
edges         (1, H, W) float32  1 where the pixel to the right or below lies on another solid or across a crease
saliency      (H, W) int64       1 on the one object that draws the eye: large, central, of an eye-catching kind
parts         (H, W) int64       ``tasks.PARTS``; 255 off the furniture
============  =================  ==================================================================================
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .furniture import LOOK_SIZE, look
from .raycast import BOX, CYLINDER, SPHERE, STRAIGHT, Hit, Solids, dot, inspect
from .rooms import Room, furnished_room
from .shading import Bodies, Light, shade
from .tasks import IGNORE, PARTS, SEMSEG, TASKS

SPLITS = ("train", "val")
MIN_SIDE = 16
_RAYS = 32768  # rendered together: 128 KB an array, which stays in the cache
_SAMPLES = ((-0.36, -0.21), (0.36, -0.21), (0.0, 0.4))  # of a pixel that an edge crosses, besides its centre


class _Batch(NamedTuple):
    """B rooms as arrays; K slots of solids."""

    solids: Solids
    looks: np.ndarray  # (LOOK_SIZE, K·3·B): of a solid's bottom, side and top
    ids: np.ndarray  # (3, K·3·B) int64: class, part, object number
    appeal: np.ndarray  # (B, objects) float64
    light: Light
    bodies: Bodies
    eye: np.ndarray  # (3, B, 1)
    axes: np.ndarray  # (3 of right, down, forward; 3, B, 1)
    reach: np.ndarray  # (B, 1): half the longer side of the image plane at unit distance


_PART = {
    BOX: [PARTS.index("box side"), PARTS.index("box side"), PARTS.index("box top")],
    CYLINDER: [PARTS.index("cylinder end"), PARTS.index("cylinder side"), PARTS.index("cylinder end")],
    SPHERE: [PARTS.index("sphere lower"), IGNORE, PARTS.index("sphere upper")],
}
_NOTHING = ((0.0, 0.0, -9.0, 0.01, 0.01, 0.01, 1.0, 0.0), (look("000000"),) * 3, (0, 0, 0), (0, 0, 0), 0)
_GROUPS = ((STRAIGHT, False), (BOX, False), (CYLINDER, False), (STRAIGHT, True), (BOX, True), (CYLINDER, True), (SPHERE, True))


def _rows(room: Room) -> list[list[tuple]]:
    """The room's solids in world coordinates, by ``_GROUPS`` of kind and whether they cast a shadow."""
    half = [s / 2 for s in room.size]
    groups: list[list[tuple]] = [[] for _ in _GROUPS]
    groups[0].append(((*half, *half, 1.0, 0.0), room.looks, (0, 1, 2), (IGNORE,) * 3, 0))
    for number, (piece, at, yaw) in enumerate(((p.piece, p.at, p.yaw) for p in room.placed), 1):
        cos, sin, name = math.cos(yaw), math.sin(yaw), SEMSEG.index(piece.name)
        straight = abs(sin * cos) < 1e-9
        for kind, (x, y, z), size, looks, leg in piece.solids:
            place = (at[0] + cos * x - sin * y, at[1] + sin * x + cos * y, at[2] + z, *size, cos, sin)
            part = [IGNORE] * 3 if piece.flat else [PARTS.index("leg")] * 3 if leg else _PART[kind]
            group = _GROUPS.index((STRAIGHT if kind == BOX and straight else kind, not piece.flat))
            groups[group].append((place, looks, (name,) * 3, part, number))
    return groups


def _camera(room: Room) -> list[tuple[float, float, float]]:
    """Unit right, down and forward in the world; the horizon is level."""
    x, y, z = (b - a for a, b in zip(room.eye, room.target, strict=True))
    ground = math.hypot(x, y)
    size = math.hypot(ground, z)
    fx, fy, fz = x / size, y / size, z / size
    rx, ry = y / ground, -x / ground
    return [(rx, ry, 0.0), (-fz * ry, fz * rx, fx * ry - fy * rx), (fx, fy, fz)]


def _having(present: Sequence[bool]) -> slice:
    """From the first to the last scene that has it."""
    return slice(present.index(True), len(present) - present[::-1].index(True))


def _pack(rooms: Sequence[Room]) -> _Batch:
    """Rooms to arrays; missing solids are filled with one under the floor."""
    grouped = [_rows(room) for room in rooms]
    counts = [max(map(len, group)) for group in zip(*grouped, strict=True)]
    table = [
        [row for group, n in zip(groups, counts, strict=True) for row in group + [_NOTHING] * (n - len(group))]
        for groups in grouped
    ]
    kinds, casts = zip(*(g for g, n in zip(_GROUPS, counts, strict=True) for _ in range(n)), strict=True)
    scenes = tuple(_having([rows[k] is not _NOTHING for rows in table]) for k in range(len(kinds)))
    place = np.array([[row[0] for row in rows] for rows in table], np.float32).transpose(1, 2, 0)[..., None]
    solids = Solids(*(np.ascontiguousarray(place[:, a:b]) for a, b in ((0, 3), (3, 6), (6, 8))), kinds, casts, scenes)
    looks = np.array([[row[1] for row in rows] for rows in table], np.float32)  # (B, K, 3, LOOK_SIZE)
    ids = np.array([[(row[2], row[3], (row[4],) * 3) for row in rows] for rows in table], np.int64)  # (B, K, 3, 3)

    def column(values: Iterable) -> np.ndarray:  # B × ... -> (..., B, 1)
        return np.moveaxis(np.array(list(values), np.float32), 0, -1)[..., None]

    most = max(len(room.placed) for room in rooms)
    bodies = [
        [(p.at[0], p.at[1], p.at[2] + p.piece.height / 2, *p.piece.half, p.piece.height / 2, math.cos(p.yaw), math.sin(p.yaw), n)
         for n, p in enumerate(room.placed, 1) if not p.piece.flat]
        for room in rooms
    ]  # fmt: skip
    deepest = max(map(len, bodies))
    blank = (0.0, 0.0, -9.0, 0.01, 0.01, 0.01, 1.0, 0.0, 0.0)
    body = column([rows + [blank] * (deepest - len(rows)) for rows in bodies])
    appeal = np.zeros((len(rooms), most + 1))
    for row, room in zip(appeal, rooms, strict=True):
        row[1 : len(room.placed) + 1] = [p.piece.appeal for p in room.placed]
    return _Batch(
        solids,
        np.ascontiguousarray(looks.transpose(3, 1, 2, 0)).reshape(LOOK_SIZE, -1),
        np.ascontiguousarray(ids.transpose(2, 1, 3, 0)).reshape(3, -1),
        appeal,
        Light(*(column(getattr(r, f) for r in rooms) for f in ("light", "light_colour", "sky_at", "sky", "ambient", "inward", "everywhere")),
              np.array([[room.sun] for room in rooms])),
        Bodies(body[:, 0:3], body[:, 3:6], body[:, 6:8], body[:, 8].astype(np.int16),
               tuple(_having([k < len(rows) for rows in bodies]) for k in range(deepest))),
        column(room.eye for room in rooms),
        column(_camera(room) for room in rooms),
        column(math.tan(room.fov / 2) for room in rooms),
    )  # fmt: skip


def _look_at(batch: _Batch, x: np.ndarray, y: np.ndarray, size: tuple[int, int], sharp: float = 1.0):
    """Cast rays through image points x, y (B or 1, N) in pixels -> hit, ids (3, B, N), colour, shadow mask."""
    height, width = size
    scale = batch.reach * np.float32(2 / max(size))  # metres a pixel at one metre
    right, down, forward = batch.axes
    a, b = (x - np.float32(width / 2)) * scale, (y - np.float32(height / 2)) * scale
    direction = right * a + down * b + forward
    hit = inspect(batch.solids, batch.eye, direction)
    scenes = np.arange(len(batch.appeal))[:, None]
    row = (hit.solid * np.int64(3) + hit.band) * len(batch.appeal) + scenes
    ids = batch.ids.take(row, axis=1)
    slope = dot(hit.normal, direction)
    slope = np.sqrt(np.maximum(slope * slope / dot(direction, direction), np.float32(0.01)))
    foot = hit.t * scale / (np.sqrt(slope) * np.float32(sharp))
    colour, lit = shade(
        hit, batch.solids, batch.looks.take(row, axis=1), batch.light, batch.bodies, ids[2].astype(np.int16), direction, foot
    )
    return hit, ids, colour, lit


def _smooth(batch: _Batch, image: np.ndarray, rough: np.ndarray, size: tuple[int, int]) -> None:
    """Replace the pixels ``rough`` (B, H·W) of ``image`` (3, B, H·W) by the mean of four samples, in place."""
    count = int(rough.sum(1).max())
    if not count:
        return
    # every scene's list is filled up to the longest with pixels that need nothing
    order = np.argsort(~rough, axis=1, kind="stable")[:, :count]
    x, y = ((order % size[1]).astype(np.float32), (order // size[1]).astype(np.float32))
    x = np.concatenate([x + np.float32(0.5 + dx) for dx, _ in _SAMPLES], 1)
    y = np.concatenate([y + np.float32(0.5 + dy) for _, dy in _SAMPLES], 1)
    _, _, colour, _ = _look_at(batch, x, y, size, sharp=2.0)
    scenes = np.arange(len(order))[:, None]
    centre = image[:, scenes, order]
    a, b, c = colour.reshape(3, len(order), 3, count).transpose(2, 0, 1, 3)
    image[:, scenes, order] = np.where(rough[scenes, order], (centre + a + b + c) * np.float32(0.25), centre)


def _differs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, H, W) -> whether a pixel differs from its right or lower neighbour; from any of its four."""
    right, down = values[:, :, 1:] != values[:, :, :-1], values[:, 1:] != values[:, :-1]
    edge = np.zeros(values.shape, bool)
    edge[:, :, :-1] |= right
    edge[:, :-1] |= down
    both = edge.copy()
    both[:, :, 1:] |= right
    both[:, 1:] |= down
    return edge, both


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


def _surfaces(hit: Hit, size: tuple[int, int]) -> np.ndarray:
    """(B, H, W): one number for each smooth face of each solid."""
    return (hit.solid * np.int16(8) + hit.face).reshape(-1, *size)


def _render(rooms: Sequence[Room], size: tuple[int, int]) -> dict[str, np.ndarray]:
    height, width = size
    batch = _pack(rooms)
    x = np.tile(np.arange(width, dtype=np.float32) + np.float32(0.5), height)[None]
    y = np.repeat(np.arange(height, dtype=np.float32) + np.float32(0.5), width)[None]
    hit, ids, image, lit = _look_at(batch, x, y, size)
    edges, rough = _differs(_surfaces(hit, size))
    _, shadow = _differs(lit.reshape(-1, *size))
    _smooth(batch, image, (rough | shadow).reshape(len(rooms), -1), size)
    corner = ((x - width / 2) ** 2 + (y - height / 2) ** 2) / np.float32(max(size) ** 2)
    image *= 1 - np.float32(0.35) * corner  # the lens darkens the corners
    normals = np.stack([dot(hit.normal, axis) for axis in batch.axes])
    shape = (len(rooms), -1, height, width)
    return {
        "image": image.swapaxes(0, 1).reshape(shape),
        "semseg": ids[0].reshape(-1, *size),
        "depth": hit.t.reshape(shape),
        "normals": normals.swapaxes(0, 1).reshape(shape),
        "edges": edges.astype(np.float32).reshape(shape),
        "saliency": _salient(ids[2], batch.appeal, size).astype(np.int64).reshape(-1, *size),
        "parts": ids[1].reshape(-1, *size),
    }


def render(
    indices: Sequence[int], size: tuple[int, int] = (64, 64), seed: int = 0, split: str = "train"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Render scenes: images (n, 3, H, W) and every task's labels, stacked.

    A scene's bits depend on its index, ``size``, ``seed`` and ``split`` alone: not on what is rendered with it.
    """
    indices = [int(i) for i in indices]
    _check(size, split, TASKS)
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
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {', '.join(map(repr, unknown))}")


class Scenes(Dataset):
    """``length`` scenes of a split; item i is (image, {task: label}), shapes above.

    Args:
        length: number of scenes, ≥ 0.
        size: (H, W), each ≥ 16; need not be square or even.
        seed: another seed, other scenes.
        split: "train" or "val"; they share no scene, whatever the seeds.
        tasks: the labels to return, a selection of ``tasks.TASKS``.

    Raises:
        ValueError: an argument is out of its range; the message names it. IndexError: no such scene.
    """

    def __init__(
        self,
        length: int,
        size: tuple[int, int] = (64, 64),
        seed: int = 0,
        split: str = "train",
        tasks: Sequence[str] = tuple(TASKS),
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
