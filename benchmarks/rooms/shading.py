"""From a hit to a colour: procedural looks, one light with shadows, soft light of window and walls, contact darkening.

The rules of ``raycast`` hold: correctly rounded operations only.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from .raycast import TINY, Hit, Solids, dot, norm, reaches

_SIDE = 512  # of the noise table, a power of two
_TEXELS = 8  # of the table per feature of the noise


class Light(NamedTuple):
    """How B scenes are lit; each (3, B, 1) or (B, 1). Positions in metres, colours in radiance × m²."""

    at: np.ndarray  # of the one light that casts shadows
    colour: np.ndarray
    sky_at: np.ndarray  # of the window's soft light
    sky: np.ndarray
    ambient: np.ndarray  # radiance from everywhere
    inward: np.ndarray  # the window's unit normal, into the room
    even: np.ndarray  # 1 if ``at`` radiates evenly, 0 if it is the window and follows the cosine
    outside: np.ndarray  # 1 if ``at`` is the sun, which comes in through the window alone


class Bodies(NamedTuple):
    """The pieces as turned boxes, for contact darkening; O of each of B scenes."""

    centre: np.ndarray  # (O, 3, B, 1)
    half: np.ndarray  # (O, 3, B, 1)
    turn: np.ndarray  # (O, 2, B, 1)
    number: np.ndarray  # (O, B, 1) which object this is
    scenes: tuple[slice, ...]  # O: no scene outside has this body


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Tiling clouds in [-1, 1] and white noise in [0, 1), both (_SIDE²,)."""
    rng = np.random.default_rng(2025)
    clouds = np.zeros((_SIDE, _SIDE))
    for step, weight in ((8, 1.0), (4, 0.5), (2, 0.3)):
        coarse = rng.random((_SIDE // step, _SIDE // step)) * 2 - 1
        at = np.arange(_SIDE) / step
        low, f = at.astype(int), at % 1
        f = f * f * (3 - 2 * f)
        high = (low + 1) % (_SIDE // step)
        rows = coarse[low] * (1 - f)[:, None] + coarse[high] * f[:, None]
        clouds += weight * (rows[:, low] * (1 - f) + rows[:, high] * f)
    clouds = np.clip(clouds / 1.2, -1, 1)
    return clouds.astype(np.float32).reshape(-1), rng.random(_SIDE**2).astype(np.float32)


def _clouds(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Smooth noise with one feature a unit, read between four texels of the table."""
    table, _ = _tables()
    u, v = u * _TEXELS, v * _TEXELS
    i, j = np.floor(u), np.floor(v)
    f, g = u - i, v - j
    i, j = i.astype(np.int32), j.astype(np.int32)
    left, right = i & (_SIDE - 1), (i + 1) & (_SIDE - 1)
    low, high = (j & (_SIDE - 1)) * _SIDE, ((j + 1) & (_SIDE - 1)) * _SIDE
    a, b = table.take(low + left), table.take(low + right)
    c, d = table.take(high + left), table.take(high + right)
    a, c = a + f * (b - a), c + f * (d - c)
    return a + g * (c - a)


def clip(x: np.ndarray) -> np.ndarray:
    """To [0, 1]."""
    return np.minimum(np.maximum(x, 0), 1)


def albedo(look: np.ndarray, uv: tuple[np.ndarray, np.ndarray], foot: np.ndarray) -> np.ndarray:
    """The look's colour (3, B, N). look: (LOOK_SIZE, B, N) rows of ``furniture.look``; foot: metres a pixel covers.

    Patterns finer than a pixel fade into their mean, so no look needs more than one sample.
    """
    a, b = look[0:3], look[3:6]
    cell_u, cell_v, shift, seam, flip_u, flip_v, shuffle, tone, grain, grain_u, grain_v = look[6:17]
    u, v = uv
    row = v / cell_v
    j = np.floor(row)
    column = u / cell_u + shift * j
    i = np.floor(column)
    du, dv = column - i, row - j
    du, dv = np.minimum(du, 1 - du) * cell_u, np.minimum(dv, 1 - dv) * cell_v  # metres to the cell's border
    sharp = 1 / foot
    fade = clip(np.minimum(cell_u, cell_v) * sharp * 0.5 - 0.25)

    parity = (i * flip_u + j * flip_v) * 0.5
    parity = (parity - np.floor(parity)) * 2
    flips = flip_u + flip_v > 0
    border = np.minimum(du + (1 - flip_u) * 64, dv + (1 - flip_v) * 64)
    parity = 0.5 + (parity - 0.5) * np.minimum(border * sharp * 2, 1)
    mix = np.where(flips, parity, 0)

    cell = (i.astype(np.int32) * 73 + j.astype(np.int32) * 12289) & (_SIDE * _SIDE - 1)
    luck = _tables()[1].take(cell)
    mix = mix + shuffle * (0.5 + (luck - 0.5) * fade)
    noise = _clouds(u * grain_u, v * grain_v)
    visible = clip(1.3 - foot * np.maximum(grain_u, grain_v) * 0.5)
    mix = mix + grain * (0.5 + 0.8 * noise * visible)
    line = (seam * 0.5 - np.minimum(du, dv)) * sharp + 0.5
    coverage = seam / cell_u + seam / cell_v
    line = np.where(coverage > 0, coverage + (clip(line) - coverage) * fade, 0)
    mix = np.maximum(clip(mix), line)
    # the tone's luck must not be the mix's: turn it over
    luck = luck * 64
    bright = 1 + tone * (luck - np.floor(luck) - 0.5) * fade * (1 - line)
    return (a + (b - a) * mix) * bright


def _contact(hit: Hit, bodies: Bodies, number: np.ndarray, room_half: np.ndarray) -> np.ndarray:
    """Darkening near walls and near other pieces, (B, N) in (0, 1]."""
    open_ = np.ones_like(hit.t)
    for k, rows in enumerate(bodies.scenes):
        x, y, z = hit.point[:, rows] - bodies.centre[k, :, rows]
        (cos, sin), (hx, hy, hz) = bodies.turn[k, :, rows], bodies.half[k, :, rows]
        x, y = np.abs(cos * x + sin * y) - hx, np.abs(cos * y - sin * x) - hy
        x, y, z = np.maximum(x, 0), np.maximum(y, 0), np.maximum(np.abs(z) - hz, 0)
        near = np.maximum(1 - np.sqrt(x * x + y * y + z * z) * 3, 0)  # within 1/3 m
        near *= number[rows] != bodies.number[k, rows]
        open_[rows] *= 1 - 0.5 * near * near
    for axis in range(3):
        gap = room_half[axis] - np.abs(hit.point[axis] - room_half[axis])
        own = (number == 0) & (np.abs(hit.normal[axis]) > 0.5)
        near = np.maximum(1 - gap * 1.6, 0) * ~own
        open_ *= 1 - 0.34 * near * near
    return open_


def _highlight(normal: np.ndarray, to_light: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Blinn's highlight, exponent 32."""
    middle = to_light - view / norm(view)
    shine = np.maximum(dot(normal, middle), 0)
    shine = shine * shine / np.maximum(dot(middle, middle), TINY * TINY)
    for _ in range(4):
        shine = shine * shine
    return shine


def shade(
    hit: Hit,
    look: np.ndarray,
    number: np.ndarray,
    view: np.ndarray,
    foot: np.ndarray,
    solids: Solids,
    light: Light,
    bodies: Bodies,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Display colour (3, B, N) in [0, 1], albedo (3, B, N), and where the light arrives (B, N).

    look, number: of the hit surface and object; view: directions of the rays; foot: metres a pixel covers there.
    """
    to_light, to_sky = light.at - hit.point, light.sky_at - hit.point
    squared, far = dot(to_light, to_light), dot(to_sky, to_sky)
    to_light, to_sky = to_light / norm(to_light), to_sky / norm(to_sky)

    facing = np.maximum(dot(hit.normal, to_light), 0)
    lit = reaches(solids, light.at, hit.point + hit.normal * 0.004, light.outside > 0) & (facing > 0)
    direct = lit * np.maximum(-dot(light.inward, to_light), light.even) / (squared + 0.5)
    # an area as large as a window: its light wraps around what faces away
    wrapped = np.maximum(dot(hit.normal, to_sky) * 0.7 + 0.3, 0)
    soft = wrapped * (np.maximum(-dot(light.inward, to_sky), 0) + 0.12) / (far + 1)
    openness = _contact(hit, bodies, number, solids.half[0])

    gloss, glow = look[17], look[18]
    received = light.ambient * ((0.95 + 0.12 * hit.normal[2]) * openness) + light.sky * (soft * openness)
    received += light.colour * (direct * facing) + glow
    paint = albedo(look, hit.uv, foot)
    colour = paint * received
    colour += light.colour * (direct * gloss * _highlight(hit.normal, to_light, view))
    colour = colour * (1 + colour * 0.12) / (1 + colour * 0.62)  # film: bright tones are compressed
    return np.sqrt(clip(colour * 1.25)), paint, lit
