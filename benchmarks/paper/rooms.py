"""One furnished room: what stands where, how it is lit and from where it is seen, all drawn from one seed."""

import math
from dataclasses import dataclass, field

from .furniture import (
    ACCENTS, BIG, FABRICS, MEDIUM, SMALL, WOODS, Draw, Look, Piece,
    box, chair, coffee_table, dining_table, look, stool, tube,
)  # fmt: skip

Point = tuple[float, float, float]


@dataclass
class Placed:
    """A piece in the room: its solids are turned by ``yaw`` about z and moved to ``at``."""

    piece: Piece
    at: Point
    yaw: float


@dataclass
class Room:
    """The layout of one scene, in metres: floor [0, x] × [0, y], ceiling at z; the camera looks along +x on the whole."""

    size: Point
    looks: tuple[Look, Look, Look]  # floor, walls, ceiling
    eye: Point
    target: Point
    fov: float  # radians, over the longer side of the image
    placed: list[Placed] = field(default_factory=list)
    taken: list[tuple[float, ...]] = field(default_factory=list)  # x0 x1 y0 y1 z0 z1 of what is there
    light: Point = (0.0, 0.0, 0.0)
    light_colour: Point = (0.0, 0.0, 0.0)  # radiance × m²
    sun: bool = False  # the light comes through the window
    sky: Point = (0.0, 0.0, 0.0)  # the window's soft light, radiance × m²
    sky_at: Point = (0.0, 0.0, 0.0)
    inward: Point = (0.0, 0.0, 0.0)  # the window's normal
    everywhere: tuple[float] = (1.0,)  # 0: the light is the window's
    ambient: Point = (0.3, 0.3, 0.3)

    def add(self, piece: Piece, x: float, y: float, yaw: float, z: float = 0.0) -> Placed | None:
        """Put the piece there if it is free and inside; None if not."""
        c, s = abs(math.cos(yaw)), abs(math.sin(yaw))
        ex, ey = c * piece.half[0] + s * piece.half[1], s * piece.half[0] + c * piece.half[1]
        if not (ex < x < self.size[0] - ex and ey < y < self.size[1] - ey and z + piece.height < self.size[2]):
            return None
        if not piece.flat or piece.bottom:
            # the free space in front: local -y
            fx, fy = math.sin(yaw) * piece.clear, -math.cos(yaw) * piece.clear
            block = (
                x - ex + min(fx, 0), x + ex + max(fx, 0), y - ey + min(fy, 0), y + ey + max(fy, 0),
                z + piece.bottom, z + piece.height,
            )  # fmt: skip
            gap = 0.04
            for b in self.taken:
                if (block[0] < b[1] + gap and b[0] < block[1] + gap and block[2] < b[3] + gap and b[2] < block[3] + gap
                        and block[4] < b[5] and b[4] < block[5]):  # fmt: skip
                    return None
            self.taken.append(block)
        self.placed.append(Placed(piece, (x, y, z), yaw))
        return self.placed[-1]

    def against(self, piece: Piece, wall: int, along: float, gap: float = 0.0) -> Placed | None:
        """Back to a wall: 0 far (x = max), 1 left (y = max), 2 right (y = 0), 3 near (x = 0); along in [0, 1]."""
        x, y, depth = self.size[0], self.size[1], piece.half[1] + gap + 0.001
        length = y if wall in (0, 3) else x
        s = piece.half[0] + along * (length - 2 * piece.half[0])
        place = [(x - depth, s, -math.pi / 2), (s, y - depth, 0.0), (s, depth, math.pi), (depth, s, math.pi / 2)][wall]
        return self.add(piece, *place)


def _surfaces(draw: Draw) -> tuple[Look, Look, Look]:
    a, b = draw.pick(WOODS)
    plank, tile = (draw.uniform(0.9, 1.4), draw.uniform(0.1, 0.17)), draw.uniform(0.3, 0.6)
    floor = draw.pick((
        look(a, b, plank, shift=0.37, seam=(0.004, 0.004), shuffle=0.55, tone=0.12, grain=0.35, scale=(1.5, 24.0), gloss=0.25),
        look(a, b, plank, shift=0.37, seam=(0.004, 0.004), shuffle=0.55, tone=0.12, grain=0.35, scale=(1.5, 24.0), gloss=0.25),
        look(draw.pick(("d8d2c6", "c9ccc9", "b8a890")), "7d786e", (tile, tile), seam=(0.012, 0.012), tone=0.12, gloss=0.4),
        look("e8e3d8", draw.pick(("3d4247", "7a5a48", "5b6f73")), (tile, tile), flip=(1, 1), gloss=0.45, grain=0.05),
        look(draw.pick(("9a958c", "7c8794", "a88f7b", "8d8a6f")), "3a3835", grain=0.28, scale=(45.0, 45.0)),
    ))  # fmt: skip
    paint = draw.pick(
        ("f2ede4", "e8e4d8", "dde3e0", "c9d6cf", "b7c4cf", "e3cfc0", "d8c9a8", "c08f73", "8fa39a", "7b929c")
    )
    stripe = draw.uniform(0.12, 0.3)
    wall = draw.pick((
        look(paint, "6b665e", grain=0.07, scale=(2.5, 2.5)),
        look(paint, "6b665e", grain=0.07, scale=(2.5, 2.5)),
        look(paint, "6b665e", grain=0.07, scale=(2.5, 2.5)),
        look(paint, draw.pick(("f2ede4", "d8d2c0")), (stripe, 64.0), flip=(1, 0)),
        look(draw.pick(("a4583e", "b9a08a", "e6e1d8")), "cfc6b8", (0.26, 0.085), shift=0.5, seam=(0.012, 0.012), tone=0.35, grain=0.2),
    ))  # fmt: skip
    return floor, wall, look("f4f2ec", "8a867e", grain=0.04, scale=(2.0, 2.0))


def _window(draw: Draw, night: bool) -> Piece:
    w, h, sill = draw.uniform(1.0, 1.8), draw.uniform(1.0, 1.3), draw.uniform(0.85, 1.0)
    a, glow = ("141c30", 0.3) if night else ("a4c8e8", 1.25)
    view = look(a, "f4f3ee", (w / 2, h), seam=(0.08, 0.08), grain=0.1 if night else 0.5, scale=(1.3, 2.2), glow=glow)
    solids = [box(0, 0, sill, w, 0.02, h, view), box(0, -0.03, sill - 0.04, w + 0.1, 0.1, 0.04, look("eeeae2"))]
    return Piece("window", solids, (w / 2 + 0.05, 0.05), sill + h, sill, appeal=0.2, flat=True)


def _door(draw: Draw) -> Piece:
    a, b = draw.pick((("efebe3", "b9b4aa"), *WOODS))
    panel = look(a, b, (0.45, 0.68), seam=(0.05, 0.05), grain=0.15, scale=(12.0, 1.2))
    solids = [box(0, 0.025, 0, 1.06, 0.03, 2.12, look("e4e0d6")), box(0, 0.005, 0, 0.9, 0.05, 2.05, panel)]
    return Piece("door", solids, (0.53, 0.04), 2.12, 0.001, appeal=0.3, flat=True, clear=0.7)


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
    return Piece("picture", solids, (w / 2, 0.02), z + h, z, appeal=1.0, flat=True)


def _rug(draw: Draw) -> Piece:
    w, d, a, b = draw.uniform(1.5, 2.4), draw.uniform(1.1, 1.6), draw.pick(FABRICS), draw.pick(("efe6d6", *ACCENTS))
    band = draw.uniform(0.1, 0.25)
    weave = draw.pick((
        look(a, b, (band, 64.0), flip=(1, 0)),
        look(a, b, (w / 6, d / 4), flip=(1, 1)),
        look(a, b, (w, d), seam=(0.2, 0.2), grain=0.15, scale=(30.0, 30.0)),
        look(a, b, grain=0.5, scale=(14.0, 14.0)),
    ))  # fmt: skip
    return Piece("rug", [box(0, 0, 0, w, d, 0.012, weave)], (w / 2, d / 2), 0.012, appeal=0.3, flat=True)


def _ceiling_lamp(draw: Draw, height: float) -> Piece:
    r, drop = draw.uniform(0.16, 0.28), draw.uniform(0.1, 0.5)
    cord, shade = look("3a3632"), look("fff3d8", glow=1.2)
    solids = [tube(0, 0, height - drop, 0.012, drop - 0.002, cord), tube(0, 0, height - drop - 0.1, r, 0.1, shade)]
    return Piece("lamp", solids, (r, r), height - 0.001, height - drop - 0.1, flat=True)


def _dress_walls(draw: Draw, room: Room, night: bool) -> None:
    """A window, where it lights what the camera sees; a door; a picture or two."""
    window, wall = _window(draw, night), draw.pick((0, 1, 1, 2, 2))
    while (at := room.against(window, wall, draw.uniform(0.3, 0.8))) is None:
        window = _window(draw, night)
    inward = [(-1, 0), (0, -1), (0, 1)][wall]
    centre = (window.bottom + window.height) / 2
    room.inward = (*inward, 0.0)
    room.sky_at = (at.at[0] + 0.4 * inward[0], at.at[1] + 0.4 * inward[1], centre)
    if draw.chance(0.65):
        room.against(_door(draw), draw.pick((0, 1, 2)), draw.uniform(0.2, 0.9))
    _light(draw, room, (at.at[0], at.at[1], centre), inward, night)


def _light(draw: Draw, room: Room, window: Point, inward: tuple[int, int], night: bool) -> None:
    """By day the sun through the window or the sky's soft light; by night a lamp under the ceiling."""
    x, y, z = room.size
    if night:
        lamp = _ceiling_lamp(draw, z)
        room.add(lamp, x * draw.uniform(0.4, 0.65), y * draw.uniform(0.35, 0.65), 0.0)
        room.light = (*room.placed[-1].at[:2], lamp.bottom - 0.06)
        warm, power = draw.uniform(0.62, 0.95), draw.uniform(2.6, 4.2)
        room.light_colour = (power, power * (0.55 + 0.45 * warm), power * warm)
        room.ambient = (0.3, 0.27, 0.24)
        return
    power = draw.uniform(2.2, 4.0)
    room.sky = (0.92 * power, 0.97 * power, 1.05 * power)
    room.ambient = (0.4, 0.4, 0.4)
    room.sun = draw.chance(0.65)
    if not room.sun:  # an overcast day: the window itself is the light that casts shadows
        room.light, room.light_colour, room.everywhere = room.sky_at, tuple(3.5 * c for c in room.sky), (0.0,)
        return
    height, slant, far = draw.uniform(0.4, 0.85), draw.uniform(-0.7, 0.7), 20.0
    away = (-inward[0] + slant * inward[1], -inward[1] + slant * inward[0], height)
    room.light = tuple(w + far * a for w, a in zip(window, away, strict=True))
    power = draw.uniform(2.6, 4.0) * far**2 * sum(a * a for a in away)
    room.light_colour = (power, 0.9 * power, 0.74 * power)


def _furnish(draw: Draw, room: Room) -> None:
    """A group in the middle, big pieces along the walls, middling ones where there is room, small ones on top."""
    x, y, _ = room.size
    cx, cy = room.target[0], room.target[1]
    group = draw.random()
    if group < 0.4:
        table = dining_table(draw)
        yaw = draw.pick((0.0, math.pi / 2)) + draw.uniform(-0.15, 0.15)
        if room.add(table, cx, cy, yaw):
            for _ in range(draw.pick((1, 2, 2))):
                side, seat = draw.pick((0, 1, 2, 3)), draw.pick((chair, chair, stool))(draw)
                turn = yaw + side * math.pi / 2
                reach = table.half[side % 2 == 0] + seat.half[1] + draw.uniform(0.0, 0.25)
                spot = cx - math.sin(turn) * reach, cy + math.cos(turn) * reach
                room.add(seat, *spot, turn + draw.uniform(-0.2, 0.2))
    elif group < 0.8:
        room.add(coffee_table(draw), cx, cy, draw.pick((0.0, math.pi / 2)) + draw.uniform(-0.1, 0.1))
    if draw.chance(0.55):
        room.add(_rug(draw), cx, cy, draw.pick((0.0, math.pi / 2)) + draw.uniform(-0.1, 0.1))
    for _ in range(draw.pick((2, 3, 3, 4))):
        piece = draw.pick(BIG)(draw)
        for _ in range(6):
            if room.against(piece, draw.pick((0, 0, 1, 2)), draw.uniform(0.0, 1.0), gap=0.06):
                break
    for _ in range(draw.pick((1, 2))):
        room.against(_picture(draw), draw.pick((0, 0, 1, 2)), draw.uniform(0.1, 0.9))
    for _ in range(draw.pick((2, 3, 4))):
        piece = draw.pick(MEDIUM)(draw)
        for _ in range(6):
            if piece.height > 1 or draw.chance(0.3):
                done = room.against(piece, draw.pick((0, 0, 1, 2)), draw.uniform(0.35, 1.0), gap=0.1)
            else:
                done = room.add(piece, draw.uniform(1.9, x - 0.4), draw.uniform(0.4, y - 0.4), draw.uniform(-3, 3))
            if done:
                break
    for below in [p for p in room.placed if p.piece.support]:
        for _ in range(draw.pick((0, 1, 2, 3))):
            piece = draw.pick(SMALL)(draw)
            reach = [h - max(piece.half) for h in below.piece.half]
            if min(reach) > 0:
                a, b = (draw.uniform(-r, r) for r in reach)
                c, s = math.cos(below.yaw), math.sin(below.yaw)
                top = below.at[2] + below.piece.height
                room.add(piece, below.at[0] + c * a - s * b, below.at[1] + s * a + c * b, draw.uniform(-3, 3), top)


def furnished_room(seed: str) -> Room:
    """The room that belongs to a seed, any text."""
    draw = Draw(seed)
    x, y, z = draw.uniform(3.7, 5.8), draw.uniform(3.0, 4.8), draw.uniform(2.4, 2.8)
    eye = (draw.uniform(0.25, 0.6), y * draw.uniform(0.12, 0.88), draw.uniform(1.25, 1.7))
    target = (x * draw.uniform(0.52, 0.68), y * draw.uniform(0.38, 0.62), draw.uniform(0.6, 1.0))
    room = Room((x, y, z), _surfaces(draw), eye, target, math.radians(draw.uniform(58, 76)))
    room.taken.append((0, eye[0] + 0.75, eye[1] - 0.6, eye[1] + 0.6, 0, z))  # nothing right before the camera
    _dress_walls(draw, room, night=draw.chance(0.35))
    _furnish(draw, room)
    return room
