"""Rooms are finite at every size: also where a ray is parallel to faces, or meets the light itself."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.rooms.furniture import look
from benchmarks.rooms.raycast import BOX, CYLINDER, SPHERE, STRAIGHT, Solids, inspect, reaches
from benchmarks.rooms.scenes import Scenes, render
from benchmarks.rooms.shading import Bodies, Light, shade

KINDS = (STRAIGHT, STRAIGHT, BOX, CYLINDER, SPHERE, STRAIGHT)
"""The room, its window, and one solid of every kind."""
CENTRES = ((2.0, 2.0, 1.5), (2.0, 3.99, 1.5), (1.0, 1.0, 0.5), (3.0, 1.0, 0.5), (1.0, 3.0, 0.5), (3.0, 3.0, 0.5))
HALVES = ((2.0, 2.0, 1.5), (0.5, 0.01, 0.5), *((0.25, 0.25, 0.25),) * 4)
STEPS = np.array([step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)], np.float32).T
"""(3, 26): along axes and diagonals, with zeros that are exact."""


@pytest.fixture(autouse=True)
def no_division_by_zero():
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        yield


@pytest.fixture
def solids():
    turn = [(1.0, 0.0)] * len(KINDS)
    turn[KINDS.index(BOX)] = (math.sqrt(0.5), math.sqrt(0.5))  # its diagonal is an axis of its own

    def columns(rows):
        return np.array(rows, np.float32)[..., None, None]

    everywhere = (slice(0, 1),) * len(KINDS)
    return Solids(columns(CENTRES), columns(HALVES), columns(turn), KINDS, (False,) * 2 + (True,) * 4, everywhere)


def column(*values):
    return np.array(values, np.float32)[:, None, None]


@pytest.mark.parametrize(("size", "scene"), [((518, 518), 21), ((392, 392), 21), ((37, 23), 4), ((16, 200), 11)])
def test_sizes_and_scenes(size, scene):
    """At the first two, a sample of an edge lies exactly in the plane of the eye that is parallel to two walls."""
    image, labels = Scenes(scene + 1, size)[scene]
    assert image.isfinite().all() and all(label.isfinite().all() for label in labels.values())


def test_many_small_scenes():
    for size in ((16, 16), (17, 31), (32, 32)):
        image, labels = render(range(60), size, seed=size[0])
        assert image.isfinite().all() and all(label.isfinite().all() for label in labels.values())


@pytest.mark.parametrize("eye", [(2.0, 2.0, 1.0), (1.0, 1.0, 2.0), (3.0, 1.0, 2.0), (1.0, 3.0, 2.0), (3.0, 0.1, 0.5)])
def test_rays_along_axes_meet_what_rays_close_by_meet(solids, eye):
    hit = inspect(solids, column(*eye), STEPS[:, None])
    aside = np.random.default_rng(1).normal(scale=1e-4, size=STEPS[:, None].shape).astype(np.float32)
    close = inspect(solids, column(*eye), STEPS[:, None] + aside)
    for values in (hit.t, hit.point, hit.normal, *hit.uv):
        assert np.isfinite(values).all()
    assert (hit.solid == close.solid).mean() > 0.8  # a diagonal of the scene may just miss a corner
    same = hit.solid == close.solid
    assert np.abs(hit.point - close.point)[:, same].max() < 0.01
    assert np.abs(np.sqrt((hit.normal**2).sum(0)) - 1).max() < 1e-5


def test_a_ray_down_an_axis_meets_the_top(solids):
    """Of every solid: from above its centre straight down, which is parallel to all its sides."""
    for k, kind in enumerate(KINDS):
        if k < 2:
            continue
        x, y, z = CENTRES[k]
        hit = inspect(solids, column(x, y, 2.5), column(0.0, 0.0, -1.0))
        assert hit.solid[0, 0] == k and hit.t[0, 0] == pytest.approx(2.5 - (z + 0.25)), kind
        assert hit.normal[:, 0, 0] == pytest.approx([0, 0, 1])
        passing = inspect(solids, column(x + 0.5, y, 2.5), column(0.0, 0.0, -1.0))
        assert passing.solid[0, 0] == 0 and passing.t[0, 0] == 2.5, kind


def test_shadows_of_a_light_straight_above(solids):
    lamp, point = column(3.0, 1.0, 2.5), np.array([[3.0, 3.0, 3.6], [1.0, 1.0, 1.0], [0.0, 0.8, 0.0]], np.float32)
    free = reaches(solids, lamp, point[:, None], np.array([[False]]))
    assert free[0].tolist() == [False, True, True]  # below the cylinder, on it, beside it


def test_a_surface_at_the_light_itself(solids):
    """The lamp and the sky's light are points; a surface through them is lit by numbers, not by 0 / 0."""
    hit = inspect(solids, column(2.0, 2.0, 1.0), STEPS[:, None])
    at = hit.point[:, :, :1]
    view = np.broadcast_to(STEPS[:, None], hit.point.shape)
    paint = np.tile(np.array(look("b98a5a", gloss=0.5), np.float32)[:, None, None], (1, *hit.t.shape))
    white = np.ones((3, 1, 1), np.float32)
    even, outside = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    light = Light(at, white, at, white, white, column(0.0, -1.0, 0.0), even, outside)
    none = Bodies(*(np.zeros((0, n, 1, 1), np.float32) for n in (3, 3, 2)), np.zeros((0, 1, 1), np.int16), ())
    colour, albedo, lit = shade(hit, paint, hit.solid, view, np.full_like(hit.t, 0.01), solids, light, none)
    assert np.isfinite(colour).all() and np.isfinite(albedo).all() and not lit[0, 0]
    assert colour.min() >= 0 and colour.max() <= 1 and lit.any()
