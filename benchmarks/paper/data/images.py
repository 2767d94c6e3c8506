"""What pretrained backbones expect of an image."""

import numpy as np

MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)
"""ImageNet's, of red, green and blue in [0, 1]."""


def normalise(image: np.ndarray) -> np.ndarray:
    """Colours (..., 3, H, W) float32 in [0, 1] less ``MEAN`` and over ``STD``."""
    return (image - MEAN[:, None, None]) / STD[:, None, None]


def colours(image: np.ndarray) -> np.ndarray:
    """The inverse of ``normalise``, up to rounding."""
    return image * STD[:, None, None] + MEAN[:, None, None]
