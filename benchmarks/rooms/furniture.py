"""Furniture: small assemblies of boxes, upright cylinders and balls, each with a look.

A piece stands on z = 0 around the origin, its back towards +y; metres. A look is the row of numbers ``shading`` reads.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

from .raycast import BOX, CYLINDER, SPHERE

Look = tuple[float, ...]


class Draw(random.Random):
    """Random choices; ``random.Random`` promises the same numbers on every platform and release, NumPy does not."""

    def pick(self, values: Sequence[Any]) -> Any:
        return values[int(self.random() * len(values))]

    def chance(self, p: float) -> bool:
        return self.random() < p


class Solid(NamedTuple):
    kind: int  # BOX, CYLINDER, SPHERE
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    looks: tuple[Look, Look, Look]  # bottom, side, top
    leg: bool = False


@dataclass
class Piece:
    """``half`` of the footprint and height bound the solids; ``clear``: metres to keep free in front."""

    name: str  # its semseg class
    solids: list[Solid]
    half: tuple[float, float]
    height: float
    bottom: float = 0.0
    appeal: float = 1.0  # how much it draws the eye, for saliency
    support: bool = False  # small things may stand on it
    flat: bool = False  # on a wall, the floor or the ceiling: no shadow, no parts
    clear: float = 0.0


@cache
def colour(code: str) -> tuple[float, float, float]:
    """'rrggbb' -> linear red, green, blue in [0, 1]; display gamma is 2."""
    r, g, b = (int(code[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return r * r, g * g, b * b


def look(
    a: str,
    b: str = "",
    cell: tuple[float, float] = (64.0, 64.0),
    *,
    shift: float = 0.0,
    seam: float = 0.0,
    flip: tuple[int, int] = (0, 0),
    shuffle: float = 0.0,
    tone: float = 0.0,
    grain: float = 0.0,
    scale: tuple[float, float] = (4.0, 4.0),
    gloss: float = 0.0,
    glow: float = 0.0,
) -> Look:
    """Colour a, mixed with b: cells of ``cell`` metres, rows moved by ``shift`` cells, seams of b ``seam`` metres wide,
    every second one b along ``flip``'s axes, a random share ``shuffle`` of b and brightness ``tone`` per cell,
    and cloudy noise ``grain`` with ``scale`` features a metre. ``gloss``: highlight; ``glow``: light of its own."""
    return (*colour(a), *colour(b or a), *cell, shift, seam, *flip, shuffle, tone, grain, *scale, gloss, glow)


LOOK_SIZE = len(look("000000"))
WOODS = [("b98a5a", "8f6238"), ("c8a678", "a27f52"), ("7a5233", "54361f"), ("d9c3a0", "bd9f74"), ("9a6b42", "6f4526")]
LACQUERS = ["efebe3", "3c4a4f", "6d7f78", "c7b299", "2f3640", "a65f46", "dfe5e6"]
FABRICS = ["4f6d7a", "8a5f52", "c9b79c", "66754f", "8c2f39", "37474f", "cf9a3d", "a3b1bf", "b86f52", "7a6a8a"]
ACCENTS = ["e63946", "f08a3c", "2a9d8f", "e9c046", "3f7cac", "8e5bd0", "e85d8a", "4caf6a", "f4f1ea"]
GREENS = [("3f7d3a", "1f4a22"), ("5c8a3c", "2f5a24"), ("6f9a52", "3a6a3a")]


def wood(draw: Draw, along_v: bool = False) -> Look:
    a, b = draw.pick(WOODS)
    scale = (22.0, 1.6) if along_v else (1.6, 22.0)
    return look(a, b, grain=0.9, scale=scale, gloss=0.15)


def fabric(draw: Draw) -> Look:
    a = draw.pick(FABRICS)
    if draw.chance(0.2):
        return look(a, draw.pick(("efebe3", "c9b79c")), (draw.uniform(0.06, 0.14), 64.0), flip=(1, 0))
    return look(a, "101014", grain=0.22, scale=(38.0, 38.0))


def accent(draw: Draw) -> Look:
    a, b = draw.pick(ACCENTS), draw.pick(ACCENTS)
    size = draw.uniform(0.05, 0.12)
    return draw.pick((
        look(a, gloss=0.6),
        look(a, gloss=0.35),
        look(a, b, (64.0, size), flip=(0, 1), gloss=0.4),
        look(a, "26262b", grain=0.5, scale=(9.0, 9.0), gloss=0.3),
    ))  # fmt: skip


def box(x: float, y: float, z: float, w: float, d: float, h: float, side: Look, top: Look = (), leg=False) -> Solid:
    """w × d × h on z, centred at x, y."""
    return Solid(BOX, (x, y, z + h / 2), (w / 2, d / 2, h / 2), (side, side, top or side), leg)


def tube(x: float, y: float, z: float, r: float, h: float, side: Look, top: Look = (), leg=False) -> Solid:
    return Solid(CYLINDER, (x, y, z + h / 2), (r, r, h / 2), (side, side, top or side), leg)


def blob(x: float, y: float, z: float, r: float, rz: float, lower: Look, upper: Look = ()) -> Solid:
    return Solid(SPHERE, (x, y, z + rz), (r, r, rz), (lower, lower, upper or lower))


def sofa(draw: Draw) -> Piece:
    w, d, cloth = draw.pick((0.85, 1.6, 2.0)) * draw.uniform(0.95, 1.1), draw.uniform(0.8, 0.92), fabric(draw)
    arm, back = draw.uniform(0.12, 0.2), draw.uniform(0.72, 0.86)
    solids = [box(0, 0, 0.04, w, d, 0.38, cloth), box(0, d / 2 - 0.1, 0.42, w, 0.2, back - 0.42, cloth)]
    solids += [box(s * (w - arm) / 2, -0.1, 0.42, arm, d - 0.2, 0.18, cloth) for s in (-1, 1)]
    for s in (-1, 1) if w > 1.2 else ():
        if draw.chance(0.7):
            solids.append(blob(s * (w / 2 - arm - 0.2), d / 2 - 0.33, 0.41, 0.16, 0.14, accent(draw)))
    return Piece("seat", solids, (w / 2, d / 2), back, clear=0.3)


def chair(draw: Draw) -> Piece:
    w, paint = draw.uniform(0.4, 0.46), wood(draw) if draw.chance(0.6) else look(draw.pick(LACQUERS), gloss=0.2)
    seat = paint if draw.chance(0.5) else fabric(draw)
    solids = [box(0, 0, 0.42, w, w, 0.05, paint, seat), box(0, w / 2 - 0.02, 0.55, w, 0.03, 0.35, paint)]
    solids += [box(s * (w / 2 - 0.025), 0.025 - w / 2, 0, 0.05, 0.05, 0.42, paint, leg=True) for s in (-1, 1)]
    solids += [box(0, w / 2 - 0.025, 0, w, 0.05, 0.42, paint, leg=True)]
    return Piece("seat", solids, (w / 2, w / 2), 0.9)


def stool(draw: Draw) -> Piece:
    r, h, paint = draw.uniform(0.17, 0.24), draw.uniform(0.42, 0.5), look(draw.pick(LACQUERS), gloss=0.3)
    solids = [tube(0, 0, h - 0.07, r, 0.07, paint, fabric(draw)), tube(0, 0, 0.02, 0.03, h - 0.09, paint, leg=True)]
    return Piece("seat", [*solids, tube(0, 0, 0, r * 0.85, 0.02, paint)], (r, r), h)


def pouf(draw: Draw) -> Piece:
    r, h = draw.uniform(0.22, 0.32), draw.uniform(0.34, 0.42)
    return Piece("seat", [tube(0, 0, 0, r, h, fabric(draw), fabric(draw))], (r, r), h)


def dining_table(draw: Draw) -> Piece:
    h, top = draw.uniform(0.7, 0.76), wood(draw)
    if draw.chance(0.35):
        r, paint = draw.uniform(0.42, 0.58), look(draw.pick(LACQUERS), gloss=0.3)
        solids = [tube(0, 0, h - 0.04, r, 0.04, top), tube(0, 0, 0.03, 0.05, h - 0.07, paint, leg=True)]
        return Piece("table", [*solids, tube(0, 0, 0, r * 0.6, 0.03, paint)], (r, r), h, support=True)
    w, d, leg = draw.uniform(1.0, 1.5), draw.uniform(0.65, 0.85), wood(draw, along_v=True)
    solids = [box(0, 0, h - 0.045, w, d, 0.045, top)]
    solids += [
        box(s * (w / 2 - 0.06), t * (d / 2 - 0.06), 0, 0.07, 0.07, h - 0.045, leg, leg=True)
        for s in (-1, 1) for t in (-1, 1)
    ]  # fmt: skip
    return Piece("table", solids, (w / 2, d / 2), h, support=True)


def coffee_table(draw: Draw) -> Piece:
    w, d, h = draw.uniform(0.8, 1.15), draw.uniform(0.45, 0.6), draw.uniform(0.36, 0.46)
    top = wood(draw) if draw.chance(0.6) else look("e4e0d8", "8b8f94", grain=0.9, scale=(5.0, 2.5), gloss=0.6)
    solids = [box(0, 0, h - 0.05, w, d, 0.05, top)]
    solids += [box(s * (w / 2 - 0.05), 0, 0, 0.05, d - 0.06, h - 0.05, top, leg=True) for s in (-1, 1)]
    return Piece("table", solids, (w / 2, d / 2), h, support=True)


def cabinet(draw: Draw) -> Piece:
    """A sideboard, a chest of drawers or a wardrobe."""
    w, d, h, columns, rows = draw.pick(((1.5, 0.42, 0.8, 3, 1), (0.9, 0.45, 0.85, 1, 4), (1.1, 0.55, 1.95, 2, 1)))
    w, h = w * draw.uniform(0.85, 1.15), h * draw.uniform(0.92, 1.08)
    if draw.chance(0.55):
        a, b = draw.pick(WOODS)
        front, top = (
            look(a, "1c1410", (w / columns, h / rows), seam=0.022, grain=0.16, scale=(3.0, 14.0)),
            look(a, b),
        )
    else:
        a = draw.pick(LACQUERS)
        front, top = look(a, "24262b", (w / columns, h / rows), seam=0.02, gloss=0.25), look(a, gloss=0.25)
    return Piece("cabinet", [box(0, 0, 0, w, d, h, front, top)], (w / 2, d / 2), h, appeal=0.6, support=h < 1.2)


def bookcase(draw: Draw) -> Piece:
    w, d, shelves, case = (
        draw.uniform(0.7, 1.1),
        0.3,
        draw.pick((3, 4, 5)),
        draw.pick(("efebe3", "7a5233", "b98a5a", "3b3f45")),
    )
    h, a, b = 0.36 * shelves, draw.pick(ACCENTS), draw.pick(FABRICS)
    books = look(a, b, (draw.uniform(0.03, 0.05), 64.0), shuffle=1.0, tone=0.9)
    solids = [box(0, 0, 0, w, d, h, look(case))]
    solids += [box(0, -0.01, 0.36 * i + 0.04, w - 0.08, d, 0.27, books) for i in range(shelves)]
    return Piece("cabinet", solids, (w / 2, d / 2 + 0.01), h, appeal=0.6, support=h < 1.3)


def floor_lamp(draw: Draw) -> Piece:
    h, r, metal = draw.uniform(1.35, 1.7), draw.uniform(0.15, 0.22), look("3a3632", gloss=0.5)
    shade = look(draw.pick(("f6e3b8", "f2d6a0", "efe6d8", "e6b98a")), glow=draw.uniform(0.5, 1.1))
    solids = [tube(0, 0, 0, 0.15, 0.025, metal), tube(0, 0, 0, 0.016, h - 0.2, metal, leg=True)]
    return Piece("lamp", [*solids, tube(0, 0, h - 0.28, r, 0.28, shade)], (r, r), h, appeal=1.5)


def table_lamp(draw: Draw) -> Piece:
    h, r, foot = draw.uniform(0.32, 0.48), draw.uniform(0.1, 0.14), accent(draw)
    shade = look(draw.pick(("f6e3b8", "f2d6a0", "efe6d8")), glow=draw.uniform(0.6, 1.2))
    solids = [blob(0, 0, 0, r * 0.7, h * 0.27, foot), tube(0, 0, h * 0.5, r, h * 0.5, shade)]
    return Piece("lamp", solids, (r, r), h, appeal=2.0)


def plant(draw: Draw) -> Piece:
    size, (a, b) = draw.uniform(0.55, 1.25), draw.pick(GREENS)
    leaves, pot, soil = look(a, b, grain=1.6, scale=(11.0, 11.0)), accent(draw), look("3b2a1f")
    r, h = 0.11 + 0.06 * size, 0.2 * size + 0.08
    solids = [tube(0, 0, 0, r, h, pot, soil), tube(0, 0, h, 0.025, 0.3 * size, look("5b4128"))]
    for i in range(draw.pick((3, 4, 5))):  # a crown, the last bunch on top
        r, out = draw.uniform(0.13, 0.19) * size, 0.13 * size if i else 0.02
        x, y = out * math.cos(2.4 * i), out * math.sin(2.4 * i)
        z = h + size * (draw.uniform(0.05, 0.22) if i else 0.26)
        solids.append(blob(x, y, z, r, r * draw.uniform(1.0, 1.4), leaves))
    reach = max(r, 0.3 * size)
    return Piece("plant", solids, (reach, reach), h + 0.75 * size, appeal=2.5)


def ball(draw: Draw, scale: float = 1.0) -> Piece:
    r, a = draw.uniform(0.11, 0.24) * scale, draw.pick(ACCENTS)
    style = draw.pick((
        (look(a, gloss=0.7), look(a, gloss=0.7)),
        (look(a, gloss=0.5), look(draw.pick(ACCENTS), gloss=0.5)),
        (look(a, "f4f1ea", (r * 1.5708, 64.0), flip=(1, 0), gloss=0.5),) * 2,
    ))  # fmt: skip
    return Piece("ball", [blob(0, 0, 0, r, r, *style)], (r, r), 2 * r, appeal=5.0)


def vessel(draw: Draw) -> Piece:
    """A vase, a pot or a mug; tall ones stand on the floor."""
    r, h, glaze = draw.uniform(0.05, 0.09), draw.uniform(0.11, 0.3), accent(draw)
    solids = [tube(0, 0, 0, r, h, glaze, look("1d1a18"))]
    if draw.chance(0.4):  # a bulb with a neck
        solids = [
            blob(0, 0, 0, r * 1.2, h * 0.35, glaze),
            tube(0, 0, h * 0.55, r * 0.5, h * 0.45, glaze, look("1d1a18")),
        ]
    return Piece("vessel", solids, (r * 1.2, r * 1.2), h, appeal=4.0)


def floor_vase(draw: Draw) -> Piece:
    r, h, glaze = draw.uniform(0.12, 0.17), draw.uniform(0.45, 0.7), accent(draw)
    solids = [tube(0, 0, 0, r, h, glaze, look("1d1a18")), tube(0, 0, h, r * 0.6, 0.07, glaze, look("1d1a18"))]
    return Piece("vessel", solids, (r, r), h + 0.07, appeal=3.0)


def carton(draw: Draw, scale: float = 1.0) -> Piece:
    w, d, h = (draw.uniform(0.26, 0.5) * scale for _ in range(3))
    if draw.chance(0.5):
        side = look("b98f5f", "8a6740", (64.0, h), grain=0.3, scale=(5.0, 5.0))
        top = look("c29a69", "e3d5b4", (64.0, d / 2), seam=0.05)
    else:
        side = top = accent(draw)
    return Piece("box", [box(0, 0, 0, w, d, h, side, top)], (w / 2, d / 2), h, appeal=2.5, support=scale == 1)


def books(draw: Draw) -> Piece:
    z, solids = 0.0, []
    for _ in range(draw.pick((2, 3))):
        w, d, h = draw.uniform(0.18, 0.24), draw.uniform(0.13, 0.17), draw.uniform(0.025, 0.05)
        solids.append(box(draw.uniform(-0.015, 0.015), 0, z, w, d, h, look(draw.pick(ACCENTS + FABRICS))))
        z += h
    return Piece("box", solids, (0.13, 0.09), z, appeal=2.0)


Maker = Callable[[Draw], Piece]
BIG: tuple[Maker, ...] = (sofa, sofa, cabinet, cabinet, bookcase)
MEDIUM: tuple[Maker, ...] = (*(floor_lamp, carton, ball, plant) * 2, plant, floor_vase, pouf, stool)
SMALL: tuple[Maker, ...] = (vessel, vessel, partial(ball, scale=0.5), table_lamp, partial(carton, scale=0.5), books)
