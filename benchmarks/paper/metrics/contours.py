"""Maps of contours: non-maximum suppression, thinning, matching one to one."""

import numpy as np
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree
from skimage.morphology import thin as thin


def _triangle(radius: int) -> np.ndarray:
    return np.concatenate([np.arange(1, radius + 2), np.arange(radius, 0, -1)]) / (radius + 1) ** 2


def _smooth(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return ndimage.correlate1d(ndimage.correlate1d(image, kernel, 0), kernel, 1)


def suppress(probability: np.ndarray, margin: int = 5, factor: float = 1.01) -> np.ndarray:
    """Non-maximum suppression along the normal of the contour."""
    strength = _smooth(probability, _triangle(1))
    dy, dx = np.gradient(_smooth(strength, _triangle(4)))
    dyy, dyx = np.gradient(dy)
    dxx = np.gradient(dx, axis=1)
    normal = np.mod(np.arctan(dyy * np.sign(-dyx) / np.where(dxx == 0, 1e-5, dxx)), np.pi)
    y, x = np.indices(strength.shape)
    keep = np.ones(strength.shape, bool)
    for side in (-1, 1):
        at = [y + side * np.sin(normal), x + side * np.cos(normal)]
        keep &= factor * strength >= ndimage.map_coordinates(strength, at, order=1, mode="nearest")
    strength = np.where(keep, strength, 0)
    margin = min(margin, strength.shape[0] // 2, strength.shape[1] // 2)
    for axis, size in enumerate(strength.shape):
        near = np.minimum(np.arange(size), np.arange(size)[::-1])
        ramp = np.minimum(near / margin, 1) if margin else np.ones(size)
        strength = strength * (ramp[:, None] if axis == 0 else ramp)
    return strength


class Matcher:
    """Pairs predicted pixels with true ones, one to one."""

    def __init__(self, truth: np.ndarray, radius: float) -> None:
        self._tree = cKDTree(np.argwhere(truth)) if truth.any() else None
        self._radius = radius

    def count(self, found: np.ndarray) -> int:
        if self._tree is None or not found.any():
            return 0
        points = cKDTree(np.argwhere(found))
        pairs = points.sparse_distance_matrix(self._tree, self._radius + 1e-9, output_type="ndarray")
        graph = csr_array((np.ones(len(pairs), bool), (pairs["i"], pairs["j"])), (points.n, self._tree.n))
        return int((maximum_bipartite_matching(graph, "column") >= 0).sum())
