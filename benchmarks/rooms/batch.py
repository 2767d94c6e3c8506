"""From room layouts to the arrays that rays are cast at: scenes side by side, every solid in a slot of its kind."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .furniture import LOOK_SIZE, look
from .labels import IGNORE, PARTS, SEMSEG
from .raycast import BOX, CYLINDER, SPHERE, STRAIGHT, Solids
from .rooms import Room
from .shading import Bodies, Light


class Batch(NamedTuple):
    """B rooms; K slots of solids."""

    solids: Solids
    looks: np.ndarray  # (LOOK_SIZE, K·3·B): of a solid's bottom, side and top
    ids: np.ndarray  # (3, K·3·B) int64: class, part, object number
    appeal: np.ndarray  # (B, objects) float64; object 0 is the room
    light: Light
    bodies: Bodies
    eye: np.ndarray  # (3, B, 1)
    axes: np.ndarray  # (right, down, forward; 3, B, 1)
    reach: np.ndarray  # (B, 1): half the longer side of the image plane at unit distance


_PART = {  # of bottom, side and top
    BOX: [PARTS.index("box side"), PARTS.index("box side"), PARTS.index("box top")],
    CYLINDER: [PARTS.index("cylinder end"), PARTS.index("cylinder side"), PARTS.index("cylinder end")],
    SPHERE: [PARTS.index("sphere lower"), IGNORE, PARTS.index("sphere upper")],
}
_LEG = [PARTS.index("leg")] * 3
_GROUPS = tuple((kind, False) for kind in (STRAIGHT, BOX, CYLINDER)) + tuple(
    (kind, True) for kind in (STRAIGHT, BOX, CYLINDER, SPHERE)
)
"""The order of the slots: kind, and whether it casts a shadow. The room and its window come first."""
# place, looks, classes, parts, object; the last three of bottom, side and top. It fills empty slots, below the floor.
_NOTHING = ((0.0, 0.0, -9.0, 0.01, 0.01, 0.01, 1.0, 0.0), (look("000000"),) * 3, (0, 0, 0), (0, 0, 0), 0)


def _solids(room: Room) -> list[list[tuple]]:
    """The room's solids in world coordinates, rows like ``_NOTHING``, by ``_GROUPS``."""
    half = [s / 2 for s in room.size]
    groups: list[list[tuple]] = [[] for _ in _GROUPS]
    groups[0].append(((*half, *half, 1.0, 0.0), room.looks, (0, 1, 2), (IGNORE,) * 3, 0))
    for number, (piece, at, yaw) in enumerate(room.placed, 1):
        cos, sin, name = math.cos(yaw), math.sin(yaw), SEMSEG.index(piece.name)
        straight = abs(sin * cos) < 1e-9
        for kind, (x, y, z), size, looks, leg in piece.solids:
            place = (at[0] + cos * x - sin * y, at[1] + sin * x + cos * y, at[2] + z, *size, cos, sin)
            part = [IGNORE] * 3 if piece.flat else _LEG if leg else _PART[kind]
            group = _GROUPS.index((STRAIGHT if kind == BOX and straight else kind, not piece.flat))
            groups[group].append((place, looks, (name,) * 3, part, number))
    return groups


def _bodies(room: Room) -> list[tuple[float, ...]]:
    """Centre, half sizes, cosine, sine and number of every piece that stands in the room."""
    rows = []
    for number, (piece, (x, y, z), yaw) in enumerate(room.placed, 1):
        if not piece.flat:
            middle = piece.height / 2
            rows.append((x, y, z + middle, *piece.half, middle, math.cos(yaw), math.sin(yaw), number))
    return rows


def _camera(room: Room) -> list[tuple[float, float, float]]:
    """Unit right, down and forward in the world; the horizon is level."""
    x, y, z = (b - a for a, b in zip(room.eye, room.target, strict=True))
    ground = math.hypot(x, y)
    size = math.hypot(ground, z)
    fx, fy, fz = x / size, y / size, z / size
    rx, ry = y / ground, -x / ground
    return [(rx, ry, 0.0), (-fz * ry, fz * rx, fx * ry - fy * rx), (fx, fy, fz)]


def _column(values: Iterable) -> np.ndarray:
    """One entry a scene, of any shape -> (..., B, 1) float32."""
    return np.moveaxis(np.array(list(values), np.float32), 0, -1)[..., None]


def _having(rows: Sequence[bool]) -> slice:
    """From the first to the last scene that has it."""
    return slice(rows.index(True), len(rows) - rows[::-1].index(True))


def pack(rooms: Sequence[Room]) -> Batch:
    """Rooms to arrays. How slots are filled depends on the company a room keeps; what its rays meet does not."""
    grouped = [_solids(room) for room in rooms]
    counts = [max(map(len, group)) for group in zip(*grouped, strict=True)]
    table = [
        [row for group, n in zip(groups, counts, strict=True) for row in group + [_NOTHING] * (n - len(group))]
        for groups in grouped
    ]
    kinds, casts = zip(*(g for g, n in zip(_GROUPS, counts, strict=True) for _ in range(n)), strict=True)
    place = _column([[row[0] for row in rows] for rows in table])  # (K, 8, B, 1)
    scenes = tuple(_having([row is not _NOTHING for row in slot]) for slot in zip(*table, strict=True))
    looks = np.array([[row[1] for row in rows] for rows in table], np.float32)  # (B, K, 3, LOOK_SIZE)
    ids = np.array([[(row[2], row[3], (row[4],) * 3) for row in rows] for rows in table], np.int64)  # (B, K, 3, 3)

    bodies = [_bodies(room) for room in rooms]
    most = max(map(len, bodies))
    blank = (*_NOTHING[0], 0.0)
    body = _column([rows + [blank] * (most - len(rows)) for rows in bodies])
    near = tuple(_having([k < len(rows) for rows in bodies]) for k in range(most))
    appeal = np.zeros((len(rooms), 1 + max(len(room.placed) for room in rooms)))
    for row, room in zip(appeal, rooms, strict=True):
        row[1 : len(room.placed) + 1] = [p.piece.appeal for p in room.placed]
    return Batch(
        Solids(place[:, :3], place[:, 3:6], place[:, 6:], kinds, casts, scenes),
        np.ascontiguousarray(looks.transpose(3, 1, 2, 0)).reshape(LOOK_SIZE, -1),
        np.ascontiguousarray(ids.transpose(2, 1, 3, 0)).reshape(3, -1),
        appeal,
        Light(*(_column(getattr(room.light, field) for room in rooms) for field in Light._fields)),
        Bodies(body[:, :3], body[:, 3:6], body[:, 6:8], body[:, 8].astype(np.int16), near),
        _column(room.eye for room in rooms),
        _column(_camera(room) for room in rooms),
        _column(math.tan(room.fov / 2) for room in rooms),
    )
