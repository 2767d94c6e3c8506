"""Rays against rooms, boxes, upright cylinders and balls: which solid, where, which way the surface faces.

Arrays are (B scenes, N rays); vectors are (3, B, N). Only +, -, ×, ÷, √, comparisons and table look-ups touch a
pixel. IEEE 754 rounds these correctly, whatever the vector width or the array's length, and so an image has the same
bits alone and in a batch. (NumPy, because torch's √ on the CPU is not correctly rounded.)

No ray divides by zero: what a ray parallel to a face would divide by is replaced by ``TINY``, so that it meets the face
too far away to matter, and all numbers stay finite.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CYLINDER, SPHERE, BOX, STRAIGHT = range(4)  # STRAIGHT: a box turned by a multiple of 90°
BOTTOM, SIDE, TOP = range(3)
TINY = np.float32(1e-15)
"""Far below any length in a room, and still with a reciprocal whose square float32 holds."""


class Solids(NamedTuple):
    """K solids of each of B scenes. Solid 0 is the room, solid 1 the window; a slot has one kind in all scenes."""

    centre: np.ndarray  # (K, 3, B, 1) metres, world: x and y along the floor, z up
    half: np.ndarray  # (K, 3, B, 1) half sizes in the solid's own frame, metres; x = y if it is round
    turn: np.ndarray  # (K, 2, B, 1) cosine and sine of the turn about z
    kinds: tuple[int, ...]  # K of CYLINDER, SPHERE, BOX, STRAIGHT
    casts: tuple[bool, ...]  # K: whether it casts a shadow
    scenes: tuple[slice, ...]  # K: no scene outside has this solid


@dataclass
class Hit:
    """What B × N rays see."""

    t: np.ndarray  # ray parameter; z-depth in metres for a camera's rays
    solid: np.ndarray  # int16, the solid's slot
    point: np.ndarray  # (3, B, N) metres, world
    normal: np.ndarray  # (3, B, N) unit, world, towards the viewer
    band: np.ndarray  # BOTTOM, SIDE or TOP of the solid; floor, wall, ceiling of the room
    face: np.ndarray  # 0..5, which smooth face: a crease lies between two
    uv: tuple[np.ndarray, np.ndarray]  # metres along the face


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(3, ...), (3, ...) -> (...); the order of the sum is fixed."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def norm(a: np.ndarray) -> np.ndarray:
    """(3, ...) -> (...): the length, of a vector of zeros ``TINY``, so that one can divide by it."""
    return np.sqrt(np.maximum(dot(a, a), TINY * TINY))


def _reciprocal(x: np.ndarray) -> np.ndarray:
    """1 / x, and 1 / ``TINY`` where |x| is smaller than that."""
    return 1 / np.where(np.abs(x) < TINY, TINY, x)


def _slab(middle: list[np.ndarray], reach: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Where a ray is between all pairs of planes: (near, far), near >= far if never."""
    near, far = middle[0] - reach[0], middle[0] + reach[0]
    for m, r in zip(middle[1:], reach[1:], strict=True):
        near, far = np.maximum(near, m - r), np.minimum(far, m + r)
    return near, far


class _Rays:
    """Rays from (3, B, 1) along (3, B, N), with what all solids need of them worked out once."""

    def __init__(self, solids: Solids, origin: np.ndarray, direction: np.ndarray) -> None:
        self.solids, self.origin, self.direction = solids, origin, direction
        self.inverse = _reciprocal(direction)
        self.reach = np.abs(self.inverse)
        self.across = direction[0] * direction[0] + direction[1] * direction[1]
        self.up = direction[2] * direction[2]

    def span(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the rays of ``solids.scenes[k]`` enter and leave solid k: (near, far), near >= far if they pass by."""
        rows = self.solids.scenes[k]
        d, inverse, reach = self.direction[:, rows], self.inverse[:, rows], self.reach[:, rows]
        kind, (cos, sin), half = self.solids.kinds[k], self.solids.turn[k, :, rows], self.solids.half[k, :, rows]
        o = self.origin[:, rows] - self.solids.centre[k, :, rows]
        if kind == STRAIGHT:
            cos, sin = np.abs(cos), np.abs(sin)
            extent = cos * half[0] + sin * half[1], sin * half[0] + cos * half[1], half[2]
            return _slab([inverse[i] * -o[i] for i in range(3)], [reach[i] * extent[i] for i in range(3)])
        if kind == BOX:
            x, y = _reciprocal(cos * d[0] + sin * d[1]), _reciprocal(cos * d[1] - sin * d[0])
            middle = [x * -(cos * o[0] + sin * o[1]), y * -(cos * o[1] - sin * o[0]), inverse[2] * -o[2]]
            return _slab(middle, [np.abs(x) * half[0], np.abs(y) * half[1], reach[2] * half[2]])
        # a t² + 2 b t + c = 0 on the curved surface, for a ball after squeezing z to its radius
        a, b, c = self.across[rows], d[0] * o[0] + d[1] * o[1], o[0] * o[0] + o[1] * o[1] - half[0] * half[0]
        if kind == SPHERE:
            squeeze = half[0] / half[2]
            squeeze = squeeze * squeeze
            a, b, c = a + self.up[rows] * squeeze, b + d[2] * (o[2] * squeeze), c + o[2] * o[2] * squeeze
        a = np.maximum(a, TINY * TINY)  # it is 0 for a ray along a cylinder's axis
        square = b * b - a * c
        root = np.copysign(np.sqrt(np.abs(square)), square)  # negative: the ray passes by, and near >= far
        near, far = (-b - root) / a, (root - b) / a
        if kind == SPHERE:
            return near, far
        middle, height = inverse[2] * -o[2], reach[2] * half[2]
        return np.maximum(near, middle - height), np.minimum(far, middle + height)


def nearest(solids: Solids, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first solid in front of ``origin`` (3, B, 1), inside the room: t and slot, (B, N) each."""
    rays = _Rays(solids, origin, direction)
    _, best = rays.span(0)  # the room is left, not entered
    slot = np.zeros(best.shape, np.int16)
    for k in range(1, len(solids.kinds)):
        near, far = rays.span(k)
        known = best[solids.scenes[k]]
        closer = (near < far) & (near < known) & (near > 0)
        np.copyto(known, near, where=closer)
        np.copyto(slot[solids.scenes[k]], k, where=closer)
    return best, slot


def reaches(solids: Solids, light: np.ndarray, point: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Whether light from (3, B, 1) arrives at (3, B, N), (B, N) bool.

    ``outside`` (B, 1) marks scenes whose light stands outside: it comes in through solid 1, the window, alone.
    """
    rays = _Rays(solids, light, point - light)
    near, far = rays.span(1)
    free = (near < far) | ~outside
    for k, casts in enumerate(solids.casts):
        if casts:
            near, far = rays.span(k)
            free[solids.scenes[k]] &= ~((near < far) & (near < 0.9999) & (near > 0))
    return free


def inspect(solids: Solids, origin: np.ndarray, direction: np.ndarray) -> Hit:
    """Trace B × N rays and describe the surface each one meets."""
    t, slot = nearest(solids, origin, direction)
    point = origin + direction * t
    scenes = np.arange(t.shape[0])[:, None]
    count = t.shape[0]
    flat = slot * np.int64(count) + scenes

    def of(values: np.ndarray) -> np.ndarray:  # (K, B, 1) -> the hit solid's value, (B, N)
        return np.ascontiguousarray(values[..., 0]).reshape(-1).take(flat)

    half = [of(solids.half[:, i]) for i in range(3)]
    cos, sin = of(solids.turn[:, 0]), of(solids.turn[:, 1])
    kind = np.array(solids.kinds, np.int8).take(slot)
    x, y, z = (point[i] - of(solids.centre[:, i]) for i in range(3))
    x, y = cos * x + sin * y, cos * y - sin * x
    px, py, pz = x / half[0], y / half[1], z / half[2]  # on the unit shape

    ax, ay, az = np.abs(px), np.abs(py), np.abs(pz)
    box, ball = kind >= BOX, kind == SPHERE
    across = np.maximum(ax, ay)
    radius = np.sqrt(px * px + py * py)
    flat_z = (az >= np.where(box, across, radius)) & ~ball  # top or bottom, of a box or a cylinder
    flat_x = box & ~flat_z & (ax >= ay)
    flat_y = box & ~flat_z & ~flat_x
    # outward normal of the unit shape: one axis on flat faces, the point itself on round ones
    nx = np.where(flat_z | flat_y, 0, px) / half[0]
    ny = np.where(flat_z | flat_x, 0, py) / half[1]
    nz = np.where(flat_z | ball, pz, 0) / half[2]
    size = np.sqrt(nx * nx + ny * ny + nz * nz) * np.where(slot == 0, np.float32(-1), 1)
    nx, ny, nz = nx / size, ny / size, nz / size
    normal = np.stack([cos * nx - sin * ny, sin * nx + cos * ny, nz])

    upper = pz > 0
    band = np.where(flat_z | ball, np.where(upper, TOP, BOTTOM), SIDE).astype(np.int8)
    face = np.where(flat_x, (px > 0).astype(np.int8), np.where(flat_y, 2 + (py > 0).astype(np.int8), 0))
    face = np.where(flat_z, 4 + upper.astype(np.int8), face).astype(np.int8)
    # round the solid: an angle made of ÷ alone, 0..4, times a quarter's mean arc
    quarter = py / (ax + ay + 1e-6)
    around = np.where(px > 0, 1 + quarter, 3 - quarter) * (half[0] * (math.pi / 2))
    u = np.where(box | flat_z, np.where(flat_x, y + half[1], x + half[0]), around)
    v = np.where(flat_z, y + half[1], z + half[2])
    return Hit(t, slot, point, normal, band, face, (u, v))
