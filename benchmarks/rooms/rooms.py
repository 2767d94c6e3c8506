"""One furnished room: what stands where, how it is lit and from where it is seen, all drawn from one seed."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from .furniture import (
    ACCENTS,
    BIG,
    FABRICS,
    MEDIUM,
    SMALL,
    WOODS,
    Draw,
    Look,
    Piece,
    box,
    chair,
    coffee_table,
    dining_table,
    look,
    stool,
    tube,
)
from .shading import Light

Point = tuple[float, float, float]
PAINTS = ("f2ede4", "e8e4d8", "dde3e0", "c9d6cf", "b7c4cf", "e3cfc0", "d8c9a8", "c08f73", "8fa39a", "7b929c")


class Placed(NamedTuple):
    """A piece in the room, turned by ``yaw`` about z and moved to ``at``."""

    piece: Piece
    at: Point
    yaw: float


@dataclass
class Room:
    """The layout of one scene, in metres: floor [0, x] × [0, y], ceiling at z; the camera looks roughly along +x."""

    size: Point
    looks: tuple[Look, Look, Look]  # floor, walls, ceiling
    eye: Point
    target: Point
    fov: float  # radians, over the longer side of the image
    placed: list[Placed] = field(default_factory=list)
    taken: list[tuple[float, ...]] = field(default_factory=list)  # x0 x1 y0 y1 z0 z1 of what is there
    light: Light | None = None  # of Python numbers

    def add(self, piece: Piece, x: float, y: float, yaw: float, z: float = 0.0) -> bool:
        """Put the piece there if the place is free and inside."""
        (c, s), (hx, hy) = (abs(math.cos(yaw)), abs(math.sin(yaw))), piece.half
        ex, ey = c * hx + s * hy, s * hx + c * hy
        if not (ex < x < self.size[0] - ex and ey < y < self.size[1] - ey and z + piece.height < self.size[2]):
            return False
        fx, fy = math.sin(yaw) * piece.clear, -math.cos(yaw) * piece.clear  # the free space in front: local -y
        x0, x1, y0, y1 = x - ex + min(fx, 0), x + ex + max(fx, 0), y - ey + min(fy, 0), y + ey + max(fy, 0)
        z0, z1, gap = z + piece.bottom, z + piece.height, 0.04
        if piece.name != "rug":  # what stands on a rug does not mind
            for a0, a1, b0, b1, c0, c1 in self.taken:
                if x0 < a1 + gap and a0 < x1 + gap and y0 < b1 + gap and b0 < y1 + gap and z0 < c1 and c0 < z1:
                    return False
            self.taken.append((x0, x1, y0, y1, z0, z1))
        self.placed.append(Placed(piece, (x, y, z), yaw))
        return True

    def against(self, piece: Piece, wall: int, along: float, gap: float = 0.0) -> bool:
        """Put its back to a wall: 0 far (x = max), 1 left (y = max), 2 right (y = 0); ``along`` it in [0, 1]."""
        (x, y, _), depth = self.size, piece.half[1] + gap + 0.001
        s = piece.half[0] + along * ((x if wall else y) - 2 * piece.half[0])
        return self.add(piece, *((x - depth, s, -math.pi / 2), (s, y - depth, 0.0), (s, depth, math.pi))[wall])


def _surfaces(draw: Draw) -> tuple[Look, Look, Look]:
    """Looks of floor, walls and ceiling."""
    a, b = draw.pick(WOODS)
    plank, tile = (draw.uniform(0.9, 1.4), draw.uniform(0.1, 0.17)), draw.uniform(0.3, 0.6)
    boards = look(a, b, plank, shift=0.37, seam=0.004, shuffle=0.55, tone=0.12, grain=0.35, scale=(1.5, 24), gloss=0.25)
    floor = draw.pick((
        boards,
        boards,
        look(draw.pick(("d8d2c6", "c9ccc9", "b8a890")), "7d786e", (tile, tile), seam=0.012, tone=0.12, gloss=0.4),
        look("e8e3d8", draw.pick(("3d4247", "7a5a48", "5b6f73")), (tile, tile), flip=(1, 1), gloss=0.45, grain=0.05),
        look(draw.pick(("9a958c", "7c8794", "a88f7b", "8d8a6f")), "3a3835", grain=0.28, scale=(45.0, 45.0)),
    ))  # fmt: skip
    paint = draw.pick(PAINTS)
    plaster = look(paint, "6b665e", grain=0.07, scale=(2.5, 2.5))
    brick = draw.pick(("a4583e", "b9a08a", "e6e1d8"))
    wall = draw.pick((
        plaster,
        plaster,
        plaster,
        look(paint, draw.pick(("f2ede4", "d8d2c0")), (draw.uniform(0.12, 0.3), 64.0), flip=(1, 0)),
        look(brick, "cfc6b8", (0.26, 0.085), shift=0.5, seam=0.012, tone=0.35, grain=0.2),
    ))  # fmt: skip
    return floor, wall, look("f4f2ec", "8a867e", grain=0.04, scale=(2.0, 2.0))


def _window(draw: Draw, night: bool) -> Piece:
    w, h, sill = draw.uniform(1.0, 1.8), draw.uniform(1.0, 1.3), draw.uniform(0.85, 1.0)
    sky, glow = ("141c30", 0.3) if night else ("a4c8e8", 1.25)
    view = look(sky, "f4f3ee", (w / 2, h), seam=0.08, grain=0.1 if night else 0.5, scale=(1.3, 2.2), glow=glow)
    solids = [box(0, 0, sill, w, 0.02, h, view), box(0, -0.03, sill - 0.04, w + 0.1, 0.1, 0.04, look("eeeae2"))]
    return Piece("window", solids, (w / 2 + 0.05, 0.05), sill + h, sill - 0.04, appeal=0.2, flat=True)


def _door(draw: Draw) -> Piece:
    a, b = draw.pick((("efebe3", "b9b4aa"), *WOODS))
    panel = look(a, b, (0.45, 0.68), seam=0.05, grain=0.15, scale=(12.0, 1.2))
    solids = [box(0, 0.025, 0, 1.06, 0.03, 2.12, look("e4e0d6")), box(0, 0.005, 0, 0.9, 0.05, 2.05, panel)]
    return Piece("door", solids, (0.53, 0.04), 2.12, appeal=0.3, flat=True, clear=0.7)


def _picture(draw: Draw) -> Piece:
    w, h, z = draw.uniform(0.4, 0.95), draw.uniform(0.4, 0.75), draw.uniform(1.3, 1.5)
    a, b = draw.pick(ACCENTS), draw.pick(FABRICS)
    canvas = draw.pick((
        look(a, b, grain=1.5, scale=(4.0, 9.0)),
        look(a, b, (w / 3, h / 2), shuffle=1.0, tone=0.5),
        look("efe9dc", a, (w / 2, h / 2), flip=(1, 1), grain=0.3),
    ))  # fmt: skip
    frame = look(draw.pick(("2b2724", "b98a5a", "f1ede6")))
    solids = [box(0, 0.01, z, w, 0.02, h, frame), box(0, -0.003, z + 0.04, w - 0.08, 0.016, h - 0.08, canvas)]
    return Piece("picture", solids, (w / 2, 0.02), z + h, z, flat=True)


def _rug(draw: Draw) -> Piece:
    w, d, a, b = draw.uniform(1.5, 2.4), draw.uniform(1.1, 1.6), draw.pick(FABRICS), draw.pick(("efe6d6", *ACCENTS))
    weave = draw.pick((
        look(a, b, (draw.uniform(0.1, 0.25), 64.0), flip=(1, 0)),
        look(a, b, (w / 6, d / 4), flip=(1, 1)),
        look(a, b, (w, d), seam=0.2, grain=0.15, scale=(30.0, 30.0)),
        look(a, b, grain=0.5, scale=(14.0, 14.0)),
    ))  # fmt: skip
    return Piece("rug", [box(0, 0, 0, w, d, 0.005, weave)], (w / 2, d / 2), 0.005, appeal=0.3, flat=True)


def _ceiling_lamp(draw: Draw, height: float) -> Piece:
    r, drop = draw.uniform(0.16, 0.28), draw.uniform(0.1, 0.5)
    cord, shade = look("3a3632"), look("fff3d8", glow=1.2)
    solids = [tube(0, 0, height - drop, 0.012, drop - 0.002, cord), tube(0, 0, height - drop - 0.1, r, 0.1, shade)]
    return Piece("lamp", solids, (r, r), height - 0.001, height - drop - 0.1, flat=True)


def _light_up(draw: Draw, room: Room) -> None:
    """A window and what lights the room: by day the sun through it or the sky's soft light, by night a ceiling lamp."""
    (x, y, z), night, wall = room.size, draw.chance(0.35), draw.pick((0, 1, 1, 2, 2))
    window = _window(draw, night)
    while not room.against(window, wall, draw.uniform(0.3, 0.8)):
        window = _window(draw, night)
    at, nx, ny = room.placed[0].at, (-1, 0, 0)[wall], (0, -1, 1)[wall]
    centre = (window.bottom + window.height) / 2
    inside, inward, dark = (at[0] + 0.4 * nx, at[1] + 0.4 * ny, centre), (nx, ny, 0), (0, 0, 0)
    if night:
        lamp = _ceiling_lamp(draw, z)
        room.add(lamp, x * draw.uniform(0.4, 0.65), y * draw.uniform(0.35, 0.65), 0.0)
        bulb = (*room.placed[-1].at[:2], lamp.bottom - 0.06)
        warm, power = draw.uniform(0.65, 0.95), draw.uniform(3.2, 4.8)
        colour = power, power * (0.55 + 0.45 * warm), power * warm
        room.light = Light(bulb, colour, inside, dark, (0.3, 0.27, 0.24), inward, 1, 0)
        return
    power = draw.uniform(2.2, 4.0)
    sky, ambient = (0.92 * power, 0.97 * power, 1.05 * power), (0.4, 0.4, 0.4)
    if draw.chance(0.35):  # overcast: the window itself is the light that casts shadows
        room.light = Light(inside, [3.5 * c for c in sky], inside, sky, ambient, inward, 0, 0)
        return
    # far enough for nearly parallel rays, near enough for float32
    far, slant, height = 20.0, draw.uniform(-0.7, 0.7), draw.uniform(0.4, 0.85)
    away = -nx + slant * ny, -ny + slant * nx, height
    sun = at[0] + far * away[0], at[1] + far * away[1], centre + far * away[2]
    power = draw.uniform(2.6, 4.0) * far**2 * sum(a * a for a in away)
    room.light = Light(sun, (power, 0.9 * power, 0.74 * power), inside, sky, ambient, inward, 1, 1)


def _furnish_middle(draw: Draw, room: Room) -> None:
    """A dining table with its seats, a coffee table or nothing; often a rug."""
    x, y, group, yaw = *room.target[:2], draw.random(), draw.pick((0.0, math.pi / 2))
    if draw.chance(0.5):
        yaw += draw.uniform(-0.15, 0.15)
    if group < 0.45:
        table = dining_table(draw)
        if room.add(table, x, y, yaw):
            for _ in range(draw.pick((1, 2, 2))):
                side, seat = draw.pick((0, 1, 2, 3)), draw.pick((chair, chair, stool))(draw)
                turn = yaw + side * math.pi / 2
                reach = table.half[side % 2 == 0] + seat.half[1] + draw.uniform(0.0, 0.25)
                spot = x - math.sin(turn) * reach, y + math.cos(turn) * reach
                room.add(seat, *spot, turn + draw.uniform(-0.2, 0.2))
    elif group < 0.85:
        room.add(coffee_table(draw), x, y, yaw)
    if draw.chance(0.55):
        room.add(_rug(draw), x, y, yaw)


def _furnish(draw: Draw, room: Room) -> None:
    """Big pieces and pictures along the walls, middling pieces where there is room, small ones on top."""
    x, y, _ = room.size
    for _ in range(draw.pick((2, 3, 3, 4))):
        piece = draw.pick(BIG)(draw)
        any(room.against(piece, draw.pick((0, 0, 1, 2)), draw.random(), gap=0.06) for _ in range(6))
    for _ in range(draw.pick((1, 2))):
        room.against(_picture(draw), draw.pick((0, 0, 1, 2)), draw.uniform(0.1, 0.9))
    for _ in range(draw.pick((3, 4, 5))):
        piece = draw.pick(MEDIUM)(draw)
        if piece.height > 1 or draw.chance(0.3):  # what is tall would stand in the way
            any(room.against(piece, draw.pick((0, 0, 1, 2)), draw.uniform(0.35, 1.0), gap=0.1) for _ in range(8))
        else:
            spots = ((draw.uniform(1.7, x - 0.3), draw.uniform(0.3, y - 0.3), draw.uniform(-3, 3)) for _ in range(8))
            any(room.add(piece, *spot) for spot in spots)
    for below, at, yaw in [placed for placed in room.placed if placed.piece.support]:
        for _ in range(draw.pick((0, 1, 2, 3))):
            piece, c, s = draw.pick(SMALL)(draw), math.cos(yaw), math.sin(yaw)
            a, b = (draw.uniform(-1, 1) * (h - max(piece.half)) for h in below.half)
            if max(piece.half) < min(below.half):
                room.add(piece, at[0] + c * a - s * b, at[1] + s * a + c * b, draw.uniform(-3, 3), at[2] + below.height)


def furnished_room(seed: str) -> Room:
    """The room that belongs to a seed, any text."""
    draw = Draw(seed)
    x, y, z = draw.uniform(3.7, 5.8), draw.uniform(3.0, 4.8), draw.uniform(2.4, 2.8)
    eye = draw.uniform(0.25, 0.6), y * draw.uniform(0.12, 0.88), draw.uniform(1.25, 1.7)
    target = x * draw.uniform(0.52, 0.68), y * draw.uniform(0.38, 0.62), draw.uniform(0.6, 1.0)
    room = Room((x, y, z), _surfaces(draw), eye, target, math.radians(draw.uniform(58, 76)))
    room.taken.append((0, eye[0] + 0.75, eye[1] - 0.6, eye[1] + 0.6, 0, z))  # nothing right before the camera
    _light_up(draw, room)
    if draw.chance(0.65):
        room.against(_door(draw), draw.pick((0, 1, 2)), draw.uniform(0.2, 0.9))
    _furnish_middle(draw, room)
    _furnish(draw, room)
    return room
