"""Training transforms: positions against torch and by hand, labels stay with the image, every step by its formula."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.paper.data import transforms
from benchmarks.paper.data.transforms import CLASSES, DEPTH, EDGES, NORMALS, PARTS

KINDS = {"semseg": CLASSES, "parts": PARTS, "depth": DEPTH, "normals": NORMALS, "edge": EDGES}
HEIGHT, WIDTH = 40, 60
SIZE = (32, 48)
SIDES = st.integers(1, 60)


def coordinates(height=HEIGHT, width=WIDTH):
    """An image whose first channels are its row and its column, and labels that hold the same."""
    row, column = np.mgrid[:height, :width]
    image = np.stack([row, column, np.zeros_like(row)], 2).astype(np.uint8)
    vectors = np.stack([column + 1, row, np.ones_like(row)], 2).astype(np.float32)
    labels = {
        "semseg": row.astype(np.uint8),
        "parts": column.astype(np.uint8),
        "depth": (column + 1)[..., None].astype(np.float32),
        "normals": vectors,
        "edge": row[..., None].astype(np.float32),
    }
    return image, labels


class Scripted:
    """A generator of random numbers that are given."""

    def __init__(self, random, uniform=()):
        self._random, self._uniform = iter(random), iter(uniform)

    def random(self):
        return next(self._random)

    def uniform(self, low, high):
        value = next(self._uniform)
        assert low <= value <= high
        return value


@settings(deadline=None, derandomize=True, max_examples=40)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 100))
def test_linear_is_torch_between_centres(height, width, tall, wide, seed):
    values = np.random.default_rng(seed).random((height, width, 2)).astype(np.float32)
    rows, columns = transforms.positions(height, tall, 0, tall), transforms.positions(width, wide, 0, wide)
    ours = transforms.linear(transforms.linear(values, rows, 0), columns, 1)
    tensor = torch.from_numpy(values.transpose(2, 0, 1))[None]
    theirs = F.interpolate(tensor, (tall, wide), mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(ours.transpose(2, 0, 1), theirs.numpy(), atol=2e-5)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 400), st.integers(1, 100))
def test_nearest_is_the_pixel_that_a_centre_lies_in(source, target, start, count):
    start = min(start, target - 1)
    count = min(count, target - start)
    expected = [int((i + Fraction(1, 2)) * Fraction(source, target)) for i in range(start, start + count)]
    assert transforms.nearest(source, target, start, count).tolist() == expected


def test_a_window_is_what_scaling_all_and_cropping_gives():
    image, labels = coordinates()
    random = np.random.default_rng(3)
    window, cropped = transforms.scale_and_crop(image, labels, KINDS, SIZE, random)
    again = np.random.default_rng(3)
    scale = again.uniform(0.5, 2)
    scaled = round(HEIGHT * scale), round(WIDTH * scale)
    top, left = (int(again.integers(max(0, have - want) + 1)) for have, want in zip(scaled, SIZE, strict=True))
    tensor = torch.from_numpy(image.transpose(2, 0, 1)).float()[None]
    whole = F.interpolate(tensor, scaled, mode="bilinear", align_corners=False)[0].numpy().transpose(1, 2, 0)
    expected = whole[top : top + SIZE[0], left : left + SIZE[1]]
    assert window.dtype == np.uint8 and window.shape == expected.shape
    assert np.abs(window - expected).max() <= 0.5 + 1e-4
    classes = F.interpolate(torch.from_numpy(labels["semseg"]).float()[None, None], scaled, mode="nearest-exact")[0, 0]
    np.testing.assert_array_equal(cropped["semseg"], classes[top : top + SIZE[0], left : left + SIZE[1]])


@pytest.mark.parametrize("seed", range(12))
def test_labels_stay_on_their_pixels(seed):
    image, labels = coordinates()
    random = np.random.default_rng(seed)
    window, cropped = transforms.scale_and_crop(image, labels, KINDS, SIZE, random)
    if seed % 2:
        window, cropped = transforms.flip(window, cropped, KINDS)
    for channel, task in enumerate(("semseg", "parts")):
        off = np.abs(window[..., channel].astype(int) - cropped[task])
        assert off.max() <= 1 and (off == 0).mean() > 0.6  # half a pixel, and half a step of rounding


@pytest.mark.parametrize("draw", range(12))
def test_all_labels_change_alike(draw):
    image, labels = coordinates()
    pixels, out = transforms.train_transform(image, labels, KINDS, SIZE, transforms.generator(draw, 0))
    assert pixels.shape == (3, *SIZE) and pixels.dtype == torch.float32
    assert out["semseg"].shape == SIZE and out["semseg"].dtype == torch.int64
    assert out["normals"].shape == (3, *SIZE) and out["depth"].shape == out["edge"].shape == (1, *SIZE)
    inside = out["semseg"] != 255
    assert torch.equal(inside, out["parts"] != 255) and torch.equal(inside, out["edge"][0] != 255)
    assert torch.equal(inside, out["normals"][2] == 1) and torch.equal(inside, out["depth"][0] > 0)
    row, column = out["semseg"][inside].float(), out["parts"][inside].float()
    assert torch.equal(out["edge"][0][inside], row) and torch.equal(out["normals"][1][inside], row)

    columns = column.view(int(inside.any(1).sum()), -1)[0]
    steps = len(columns) - 1
    is_flipped = bool(columns[0] > columns[-1])
    sign = -1 if is_flipped else 1
    assert torch.equal(out["normals"][0][inside], sign * (column + 1))
    scale = (column + 1) / out["depth"][0][inside]
    assert scale.max() - scale.min() < 1e-5 and 0.5 <= scale[0] <= 2
    covered = float(columns.max() - columns.min())
    assert covered == pytest.approx(steps / float(scale[0]), abs=1.6)


def test_flips_are_half_of_the_draws_and_scales_spread():
    image, labels = coordinates()
    flips, scales = [], []
    for draw in range(200):
        _, out = transforms.train_transform(image, labels, KINDS, SIZE, transforms.generator(draw, 7))
        known = out["depth"][0] > 0
        flips.append(bool((out["normals"][0][known] < 0).all()))
        scales.append(float(((out["parts"][known] + 1) / out["depth"][0][known])[0]))
    assert 75 <= sum(flips) <= 125
    assert min(scales) < 0.55 and max(scales) > 1.9 and np.mean(scales) == pytest.approx(1.25, abs=0.1)


def test_crops_that_show_one_class_are_drawn_again():
    image = np.zeros((40, 400, 3), np.uint8)
    labels = {"semseg": np.zeros((40, 400), np.uint8)}
    labels["semseg"][:, 200:] = 1  # one crop in five sees enough of both
    kinds = {"semseg": CLASSES}
    shares = []
    for draw in range(100):
        _, out = transforms.train_transform(image, labels, kinds, (20, 80), transforms.generator(draw, 0))
        shares.append(float(np.bincount(out["semseg"][out["semseg"] != 255]).max() / (out["semseg"] != 255).sum()))
    assert np.mean(np.array(shares) < 0.75) > 0.6
    assert max(shares) == 1  # ten tries are all


def test_only_what_is_labelled_decides_about_a_crop():
    labels = np.full((10, 10), 255, np.uint8)
    assert not transforms._is_mixed(labels)
    labels[0, :4] = 3
    assert not transforms._is_mixed(labels)
    labels[0, 0] = 5
    assert not transforms._is_mixed(labels)  # three of four are 75 %
    labels[0, 1] = 5
    assert transforms._is_mixed(labels)


def test_an_image_without_parts_is_ignored_after_the_crop():
    image = np.zeros((64, 64, 3), np.uint8)
    parts, semseg = np.zeros((64, 64), np.uint8), np.random.default_rng(0).integers(0, 4, (64, 64)).astype(np.uint8)
    parts[:8, :8] = 3
    kinds = {"semseg": CLASSES, "parts": PARTS}
    seen = set()
    for draw in range(30):
        random = transforms.generator(draw, 0)
        _, out = transforms.train_transform(image, {"semseg": semseg, "parts": parts}, kinds, (32, 32), random)
        values = set(out["parts"].unique().tolist())
        assert values <= {0, 3, 255} and (3 in values or values == {255})
        seen.add(3 in values)
    assert seen == {True, False}


def test_evaluation_by_hand():
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    labels = {
        "semseg": np.arange(12, dtype=np.uint8).reshape(3, 4),
        "parts": np.zeros((3, 4), np.uint8),
        "depth": np.arange(12, dtype=np.float32).reshape(3, 4, 1),
        "normals": np.arange(36, dtype=np.float32).reshape(3, 4, 3),
        "edge": np.ones((3, 4, 1), np.float32),
    }
    pixels, out = transforms.eval_transform(image, labels, KINDS, (6, 5))
    inside = np.zeros((6, 5), bool)
    inside[1:4, 0:4] = True  # of three rows too many one comes first, of one column none
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((image / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels[:, inside].numpy().reshape(3, 3, 4), expected, atol=1e-6)
    assert (pixels[:, ~inside] == 0).all()
    for task, fill in (("semseg", 255), ("edge", 255), ("depth", 0), ("normals", 0)):
        flat = labels[task].reshape(12, -1).T.squeeze()
        np.testing.assert_array_equal(out[task].numpy()[..., inside].squeeze(), flat)
        assert (out[task].numpy()[..., ~inside] == fill).all()
    assert (out["parts"] == 255).all()


@pytest.mark.parametrize(
    ("random", "uniform", "pixel", "expected"),
    [
        ((0.9, 0.9, 0.9, 0.9), (), (10, 100, 250), (10, 100, 250)),
        ((0.1, 0.9, 0.9, 0.9), (20,), (10, 100, 250), (30, 120, 255)),
        ((0.1, 0.9, 0.9, 0.9), (-20,), (10, 100, 250), (0, 80, 230)),
        ((0.9, 0.1, 0.9, 0.9), (1.5,), (10, 100, 250), (15, 150, 255)),
        ((0.9, 0.9, 0.1, 0.9), (0.5,), (200, 0, 0), (200, 100, 100)),
        ((0.9, 0.9, 0.9, 0.1), (18,), (200, 0, 0), (200, 120, 0)),  # 36° of the 60° from red to yellow
        ((0.9, 0.9, 0.9, 0.1), (-18,), (200, 0, 0), (200, 0, 120)),
        ((0.1, 0.1, 0.9, 0.9), (20, 0.5), (10, 100, 250), (15, 60, 128)),  # brightness first, clipped
    ],
)
def test_colours_by_hand(random, uniform, pixel, expected):
    image = np.tile(np.array(pixel, np.uint8), (4, 5, 1))
    out = transforms.distort(image, Scripted(random, uniform))
    assert out.dtype == np.uint8 and out.shape == image.shape
    assert np.abs(out.astype(int) - expected).max() <= 4  # steps of a hue in 8 bits


def test_every_colour_change_is_drawn_half_of_the_time():
    image = np.random.default_rng(0).integers(40, 200, (8, 8, 3)).astype(np.uint8)
    same = sum(np.array_equal(transforms.distort(image, transforms.generator(draw, 0)), image) for draw in range(320))
    assert 8 <= same <= 36  # one in sixteen


def test_draw_and_index_decide():
    numbers = {key: transforms.generator(*key).random() for key in ((0, 0), (0, 1), (1, 0), (1, 1), (12, 3), (3, 12))}
    assert len(set(numbers.values())) == len(numbers)
    assert transforms.generator(12, 3).random() == numbers[12, 3]
    with pytest.raises(ValueError, match="draw must be at least 0, or None, got -1"):
        transforms.generator(-1, 0)
