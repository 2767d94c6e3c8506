"""What is done to an image and its dense labels before a model sees them.

Training, in this order: a random scale, a random crop, a flip, colours, ImageNet's mean and deviation, padding all
around, regions to ignore. Evaluation: mean and deviation, padding, regions to ignore.

Pixels are squares and coordinates are those of their centres: pixel i of m that n pixels are scaled to lies at
(i + 1/2) n/m - 1/2. Images are interpolated linearly between the pixels around it, without a filter against aliasing;
labels are those of the pixel it lies in. Both use the same positions, so they stay aligned to within half a pixel. (In
OpenCV, which much code for these data sets scales with, labels are shifted against the image by up to half a pixel.)
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...rooms.labels import IGNORE
from .dataset import Item
from .images import MEAN, STD

SCALES = (0.5, 2.0)
CROPS = 10
"""So many crops are tried until the largest class covers less than ``LARGEST`` of what is labelled."""
LARGEST = 0.75
BRIGHTNESS = 32
"""At most so much is added, of 255."""
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18
"""At most so much is added, of 180 that make a full turn: OpenCV's units of hue for images of 8 bits."""


class Kind(NamedTuple):
    """How a label changes with its image."""

    fill: int
    """Around the image, where nothing is known."""
    dtype: torch.dtype
    is_depth: bool = False
    """A distance: twice as large an image of the same things is one from half as far."""
    is_vector: bool = False
    """Its first channel points to the right: it changes sign in a mirror."""
    is_foreground: bool = False
    """Where an image shows background only, nothing is known, and it is ignored as a whole."""


CLASSES = Kind(IGNORE, torch.int64)
PARTS = Kind(IGNORE, torch.int64, is_foreground=True)
EDGES = Kind(IGNORE, torch.float32)
DEPTH = Kind(0, torch.float32, is_depth=True)
NORMALS = Kind(0, torch.float32, is_vector=True)

Arrays = Mapping[str, np.ndarray]
"""Labels by task: (H, W) for classes, else (H, W, C) float32."""
Kinds = Mapping[str, Kind]


def generator(draw: int, index: int) -> np.random.Generator:
    """What is random about an item, which nothing but its index and its draw decide.

    Raises:
        ValueError: the draw is negative.
    """
    if draw < 0:
        raise ValueError(f"draw must be at least 0, or None, got {draw}")
    return np.random.default_rng((draw, index))


def train_transform(
    image: np.ndarray, labels: Arrays, kinds: Kinds, size: tuple[int, int], random: np.random.Generator
) -> Item:
    """An image of any size (H, W, 3) uint8 and its labels, as training sees them once.

    Args:
        labels: "semseg" must be among them: it decides which crops are wanted.
        size: (height, width) of the result.

    Returns:
        the normalised image, (3, height, width) float32, and labels: (height, width) int64 for classes, else (C,
        height, width) float32.
    """
    image, labels = scale_and_crop(image, labels, kinds, size, random)
    if random.random() < 0.5:
        image, labels = flip(image, labels, kinds)
    return eval_transform(distort(image, random), labels, kinds, size)


def eval_transform(image: np.ndarray, labels: Arrays, kinds: Kinds, size: tuple[int, int]) -> Item:
    """An image that is no larger than ``size``, and its labels, as an evaluation sees them: shapes as in training."""
    normalised = (image.astype(np.float32) / np.float32(255) - MEAN) / STD
    tensors = {name: _tensor(pad(label, size, kinds[name].fill), kinds[name]) for name, label in labels.items()}
    return torch.from_numpy(np.ascontiguousarray(pad(normalised, size, 0).transpose(2, 0, 1))), tensors


def _tensor(label: np.ndarray, kind: Kind) -> Tensor:
    if kind.is_foreground and not ((label != 0) & (label != IGNORE)).any():
        label = np.full_like(label, IGNORE)
    channels_first = label.transpose(2, 0, 1) if label.ndim == 3 else label
    return torch.from_numpy(np.ascontiguousarray(channels_first)).to(kind.dtype)


def positions(source: int, target: int, start: int, count: int) -> np.ndarray:
    """Where pixels start … start + count - 1 of ``target`` lie among ``source`` pixels, (count,) float64."""
    return (np.arange(start, start + count) + 0.5) * (source / target) - 0.5


def nearest(source: int, target: int, start: int, count: int) -> np.ndarray:
    """The pixels of ``source`` that they lie in, (count,) int64, from whole numbers: none is off by rounding."""
    return (2 * np.arange(start, start + count) + 1) * source // (2 * target)


def linear(values: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    """Values (float32) between the pixels of an axis; beyond the outermost centres it is their value."""
    last = values.shape[axis] - 1
    at = at.clip(0, last)
    low = at.astype(np.int64)
    weight = (at - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    first, second = values.take(low, axis), values.take(np.minimum(low + 1, last), axis)
    return first + (second - first) * weight


def scale_and_crop(
    image: np.ndarray, labels: Arrays, kinds: Kinds, size: tuple[int, int], random: np.random.Generator
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A random scale, then a random window of at most ``size``; only the window is computed."""
    sides = image.shape[:2]
    scale = random.uniform(*SCALES)
    scaled = [max(1, round(side * scale)) for side in sides]
    room = [max(0, have - want) for have, want in zip(scaled, size, strict=True)]
    count = [min(have, want) for have, want in zip(scaled, size, strict=True)]
    for _ in range(CROPS if any(room) else 1):
        start = [int(random.integers(most + 1)) for most in room]
        rows, columns = map(nearest, sides, scaled, start, count)
        if _is_mixed(labels["semseg"].take(rows, 0).take(columns, 1)):
            break
    y, x = map(positions, sides, scaled, start, count)
    window = linear(linear(image.astype(np.float32), y, 0), x, 1)
    cropped = {name: label.take(rows, 0).take(columns, 1) for name, label in labels.items()}
    for name, label in cropped.items():
        if kinds[name].is_depth:
            cropped[name] = label / np.float32(scale)
    return np.rint(window).astype(np.uint8), cropped


def _is_mixed(classes: np.ndarray) -> bool:
    counts = np.bincount(classes[classes != IGNORE].ravel())
    return counts.size > 0 and counts.max() < LARGEST * counts.sum()


def flip(image: np.ndarray, labels: Arrays, kinds: Kinds) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The mirror image, left for right."""
    flipped = {name: label[:, ::-1] for name, label in labels.items()}
    for name, label in flipped.items():
        if kinds[name].is_vector:
            flipped[name] = label * np.array((-1, 1, 1), label.dtype)
    return image[:, ::-1], flipped


def distort(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, in this order, each with probability 1/2; uint8 to uint8.

    The last two are changed in Pillow's HSV of 8 bits.
    """
    colours = image.astype(np.float32)
    if random.random() < 0.5:
        colours = (colours + np.float32(random.uniform(-BRIGHTNESS, BRIGHTNESS))).clip(0, 255)
    if random.random() < 0.5:
        colours = (colours * np.float32(random.uniform(*CONTRAST))).clip(0, 255)
    saturation = random.uniform(*SATURATION) if random.random() < 0.5 else None
    hue = random.uniform(-HUE, HUE) if random.random() < 0.5 else None
    pixels = np.rint(colours).astype(np.uint8)
    if saturation is None and hue is None:
        return pixels
    hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
    if saturation is not None:
        hsv[..., 1] = np.rint(hsv[..., 1] * np.float32(saturation)).clip(0, 255)
    if hue is not None:
        hsv[..., 0] += np.uint8(round(hue * 256 / 180) % 256)  # which wraps around, as a hue does
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def pad(array: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
    """Centred in (height, width, …) of ``fill``; where the margin is odd, the far side is one wider."""
    top, left = ((want - have) // 2 for want, have in zip(size, array.shape[:2], strict=True))
    padded = np.full((*size, *array.shape[2:]), fill, array.dtype)
    padded[top : top + array.shape[0], left : left + array.shape[1]] = array
    return padded
