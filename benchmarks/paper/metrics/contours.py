"""Maps of contours: non-maximum suppression, thinning, and matching pixel by pixel."""

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from scipy.spatial import cKDTree

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# --- non-maximum suppression ------------------------------------------------------------------------------------------

MARGIN = 5
"""Pixels along the image's border where the strength falls off linearly to zero, as it is noisy there."""
SLACK = 1.01
"""A pixel is kept unless a neighbour across the contour is stronger by more than this factor."""


def suppress(probability: Floats, least: float) -> Floats:
    """Strengths of contours (H, W): zero wherever a map of probabilities is not the highest across its contour.

    This is the suppression of the Structured Edge Detection Toolbox (Dollár and Zitnick, 2015), by which boundary
    benchmarks are scored. The map, smoothed by a triangle of radius 1, is compared with itself one pixel to either side
    along the normal, interpolated. From second derivatives d of the map smoothed once more, by a triangle of radius 4,
    the toolbox takes the normal to be (d_xx, -sign(d_xy) d_yy), which is right along the axes and the diagonals.

    Where d_xy vanishes, as in exactly horizontal and vertical contours, there is no such sign, and the normal is the
    axis along which the map is curved most. The toolbox takes the horizontal one, and leaves horizontal contours thick.

    Args:
        probability: (H, W), in [0, 1].
        least: strengths below it are zero.
    """
    strength = _smooth(probability, 1)
    smooth = _smooth(strength, 4)
    slope = _slope(smooth, 0)
    rows, columns = at = np.nonzero(strength >= least)
    yy, xy, xx = _slope(slope, 0)[at], _slope(slope, 1)[at], _slope(_slope(smooth, 1), 1)[at]
    aligned = np.abs(xy) <= 1e-12  # of maps up to 1: zero but for rounding
    yy = np.where(aligned, np.where(np.abs(yy) > np.abs(xx), yy, 0), -np.sign(xy) * yy)
    xx = np.where(aligned & (yy != 0), 0, xx)
    length = np.maximum(np.hypot(xx, yy), np.finfo(float).tiny)
    kept = strength[at]
    highest = np.ones(len(kept), bool)
    for side in (-1, 1):
        beside = np.stack([rows + side * yy / length, columns + side * xx / length])
        highest &= SLACK * kept >= ndimage.map_coordinates(strength, beside, order=1, mode="nearest")
    out = np.zeros_like(strength)
    out[at] = np.where(highest, kept, 0)
    return _fade(out)


def _smooth(image: Floats, radius: int) -> Floats:
    """Convolve with a triangle along both axes; the image is mirrored at its border."""
    rise = np.arange(1, radius + 2)
    kernel = np.concatenate([rise, rise[-2::-1]]) / (radius + 1) ** 2
    return ndimage.correlate1d(ndimage.correlate1d(image, kernel, 0), kernel, 1)


def _slope(image: Floats, axis: int) -> Floats:
    return np.gradient(image, axis=axis) if image.shape[axis] > 1 else np.zeros_like(image)


def _fade(strength: Floats) -> Floats:
    margin = min(MARGIN, *(size // 2 for size in strength.shape))
    if margin:
        for axis, size in enumerate(strength.shape):
            near = np.minimum(np.arange(size), np.arange(size)[::-1])
            strength = strength * np.expand_dims(np.minimum(near / margin, 1), 1 - axis)
    return strength


# --- thinning ---------------------------------------------------------------------------------------------------------


def _removable() -> Bools:
    """(2, 256): whether each of the two passes of Guo and Hall (1989) removes a pixel with the neighbours of an index.

    Bit k - 1 is x_k of their paper: x_1 lies to the right, the others follow anticlockwise.
    """
    x = [(np.arange(256) >> k) & 1 == 1 for k in (7, *range(8), 0)]  # x[1] ... x[8], then x_1 again
    crossings = sum((~x[k] & (x[k + 1] | x[k + 2])).astype(int) for k in (1, 3, 5, 7))
    pairs = [sum((x[k + odd] | x[k + odd + 1]).astype(int) for k in (1, 3, 5, 7)) for odd in (0, 1)]
    may = (crossings == 1) & np.isin(np.minimum(*pairs), (2, 3))
    return np.stack([may & ~((x[2] | x[3] | ~x[8]) & x[1]), may & ~((x[6] | x[7] | ~x[4]) & x[5])])


_REMOVABLE = _removable()


def thin(image: Bools) -> Bools:
    """Thin a map (H, W) to lines one pixel wide: ``skimage.morphology.thin``, pixel for pixel.

    This looks at pixels that are set, and again only at those beside one removed since; scikit-image's looks at every
    pixel in every pass, which on maps as sparse as contours takes longer than all the rest of the metric.
    """
    width = image.shape[1] + 2
    around = (1, 1 - width, -width, -width - 1, -1, width - 1, width, width + 1)
    pixels = np.pad(image, 1).ravel()
    look = np.flatnonzero(pixels)
    removed = [look, look]  # by the two passes before: what a pass has not seen yet
    for turn in itertools.count():
        if turn > 1:
            beside = np.zeros_like(pixels)
            for step in around:
                beside[np.concatenate(removed) + step] = True
            look = np.flatnonzero(beside & pixels)
        neighbours = np.zeros(len(look), np.uint8)
        for bit, step in enumerate(around):
            neighbours |= pixels[look + step].view(np.uint8) << bit
        gone = look[_REMOVABLE[turn % 2][neighbours]]
        pixels[gone] = False
        removed = [removed[1], gone]
        if not any(map(len, removed)):
            break
    return pixels.reshape(-1, width)[1:-1, 1:-1]


# --- matching ---------------------------------------------------------------------------------------------------------


class Matcher:
    """Pairs predicted pixels with true ones at most ``radius`` pixels away, one to one, as many as possible.

    Precision and recall need only the number of pairs. It is the maximum flow from a source through one predicted pixel
    and one true one to a sink, all capacities 1, by Dinic's algorithm, whose time is bounded by the pairs within reach
    times the root of the pixels; ``scipy.sparse.csgraph.maximum_bipartite_matching`` finds the same number, but takes
    up to ten seconds on a map full of weak contours. The Berkeley benchmark looks for the cheapest assignment in which
    a pixel left alone costs a hundred times the radius: there too as many pairs as possible, but for what it misses by
    its random choice of the pixels that may be left alone together.

    Args:
        candidates: (H, W), all pixels that may be predicted.
        truth: (H, W).
    """

    def __init__(self, candidates: Bools, truth: Bools, radius: float) -> None:
        # squared distances are whole numbers: half way to the next one, so that rounding decides nothing
        reach = np.sqrt(np.floor(radius**2 * (1 + 1e-12)) + 0.5)
        true, maybe = np.argwhere(truth), np.argwhere(candidates)
        pairs = cKDTree(maybe).sparse_distance_matrix(cKDTree(true), reach, output_type="coo_matrix").tocsr()
        rows = np.flatnonzero(np.diff(pairs.indptr))
        self._row = np.full(candidates.shape, -1)
        self._row[tuple(maybe[rows].T)] = np.arange(len(rows))
        self._near = pairs[rows]

    def count(self, found: Bools) -> int:
        """Number of pairs when the pixels of ``found`` (H, W), a subset of the candidates, are predicted."""
        row = self._row[found]
        near = self._near[row[row >= 0]]
        predicted, true = near.shape
        source, sink = predicted + true, predicted + true + 1  # after the nodes of the pixels
        targets = np.concatenate([near.indices + predicted, np.full(true, sink), np.arange(predicted)])
        ends = near.nnz + np.arange(true + 1)
        starts = np.concatenate([near.indptr, ends[1:], [len(targets), len(targets)]])
        network = csr_array(
            (np.ones(len(targets), np.int32), targets.astype(np.int32), starts.astype(np.int32)), (sink + 1, sink + 1)
        )
        return int(maximum_flow(network, source, sink, method="dinic").flow_value)
