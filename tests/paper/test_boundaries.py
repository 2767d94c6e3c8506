"""F of boundaries: cases worked by hand, its parts against plain ones, the whole against pyEdgeEval where it installs.

All lines of the cases by hand are 17 pixels long, in images of 30 × 40 pixels, whose diagonal is 50: a share of 0.02
reaches one pixel. A line predicted with certainty has a strength of 0.5 after smoothing, 0.375 at its ends, and no
more than 0.125 beyond them.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from skimage.morphology import thin as skimage_thin

from benchmarks.paper.metrics import BoundaryF
from benchmarks.paper.metrics.boundaries import THRESHOLDS
from benchmarks.paper.metrics.contours import Matcher, suppress, thin
from benchmarks.rooms.labels import IGNORE
from benchmarks.rooms.scenes import render

LENGTH = 17
ONE_PIXEL = 0.02


def lines(*columns, rows=slice(7, 7 + LENGTH)):
    """A map with vertical lines."""
    image = np.zeros((30, 40), bool)
    for column in columns:
        image[rows, column] = True
    return image


def logits(image, low=-20.0):
    """Of a map of probabilities that are 1, or whatever it holds, and next to 0."""
    probability = np.asarray(image, float)
    high = np.log(np.maximum(probability, 1e-300)) - np.log(np.maximum(1 - probability, 1e-9))
    return np.where(probability > 0, high, low)


def f(*pairs, max_distance=ONE_PIXEL, cut=None):
    """Of (logits, labels) of a split, in one batch or in several."""
    prediction, target = (
        torch.tensor(np.stack(list(part))[:, None].astype(float)) for part in zip(*pairs, strict=True)
    )
    meter = BoundaryF(max_distance)
    for p, y in zip(prediction.split(cut or len(pairs)), target.split(cut or len(pairs)), strict=True):
        meter.update(p, y)
    return meter.compute()


# --- worked by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose", [False, True])
def test_the_truth_itself_scores_100(transpose):
    line = lines(20).T if transpose else lines(20)
    assert f((logits(line), line)) == 100


@pytest.mark.parametrize(("shift", "reach", "want"), [(1, 1, 100), (1, 0.999, 0), (2, 2, 100), (2, 1.999, 0)])
@pytest.mark.parametrize("transpose", [False, True])
def test_a_shifted_line_is_found_within_reach_and_no_farther(shift, reach, want, transpose):
    predicted, truth = lines(20 + shift), lines(20)
    if transpose:
        predicted, truth = predicted.T, truth.T
    assert f((logits(predicted), truth), max_distance=ONE_PIXEL * reach) == want


def test_of_two_lines_beside_a_true_one_only_one_is_right():
    # 17 pairs, 34 predicted, 17 true; at a threshold above 0.375 there are 15 pairs, 30 predicted
    assert f((logits(lines(15, 25)), lines(20)), max_distance=5 * ONE_PIXEL) == pytest.approx(100 * 2 * 17 / (34 + 17))


def test_one_predicted_line_pairs_with_only_one_of_two_true_ones():
    assert f((logits(lines(20)), lines(15, 25)), max_distance=5 * ONE_PIXEL) == pytest.approx(100 * 2 * 17 / (17 + 34))


def test_nothing_predicted_nothing_true_and_neither():
    line, nothing = lines(20), lines()
    assert f((logits(nothing), line)) == 0
    assert f((logits(line), nothing)) == 0
    assert math.isnan(f((logits(nothing), nothing)))
    assert math.isnan(f((logits(line), np.full(line.shape, IGNORE))))
    assert math.isnan(BoundaryF(0.01).compute())
    # what is predicted where nothing is true counts as wrong: 17 pairs, 34 predicted
    assert f((logits(line), line), (logits(line), nothing)) == pytest.approx(100 * 2 * 17 / (34 + 17))


@pytest.mark.parametrize(("width", "left"), [(2, 16), (3, 17), (4, 16)])
def test_a_thick_line_is_thinned(width, left):
    # of three columns the middle one is highest; of two or four, two are, and thinning leaves one and loses an end
    thick, truth = lines(*range(20, 20 + width)), lines(20 + (width - 1) // 2)
    assert f((logits(thick), truth)) == pytest.approx(100 * 2 * left / (left + 17))


def test_the_best_threshold_is_that_of_the_whole_split():
    # strengths 0.45, 0.35 and 0.25, three quarters of it at the ends: at 0.26, and nowhere else, the first two lines
    # are complete and the third is not there
    ramp = 0.9 * lines(8) + 0.7 * lines(20) + 0.5 * lines(32)
    assert f((logits(ramp), lines(8, 20))) == 100
    # only the first one true: above 0.35 it is without its ends, 15 pairs of 15 and 17
    assert f((logits(ramp), lines(8))) == pytest.approx(100 * 2 * 15 / (15 + 17))
    # the first in one image, the third in another: 0.45 is best for the one, 93.75, and 0.18 for the other, 50; for
    # both it is 0.18, where all three lines are there, 34 pairs of 102 and 34, against 15 of 30 and 34
    split = [(logits(ramp), lines(8)), (logits(ramp), lines(32))]
    assert f(split[1]) == pytest.approx(100 * 2 * 17 / (51 + 17))
    assert f(*split) == pytest.approx(100 * 2 * 34 / (102 + 34))


def test_counts_are_summed_over_the_split_not_averaged():
    line, nothing = lines(20), lines()
    assert f((logits(line), line), (logits(nothing), line)) == pytest.approx(100 * 2 * 17 / (17 + 34))  # not 50


# --- what is ignored --------------------------------------------------------------------------------------------------


def test_padding_has_no_part_in_it():
    rng = np.random.default_rng(0)
    predicted, truth = logits(lines(21, 30)), lines(20, 31).astype(float)
    padded = rng.normal(size=(46, 64)) * 9
    padded[5:35, 11:51] = predicted
    label = np.full(padded.shape, float(IGNORE))
    label[5:35, 11:51] = truth
    for reach in (0.999, 1):  # the padded diagonal is longer
        share = ONE_PIXEL * reach
        assert f((padded, label), max_distance=share) == f((predicted, truth), max_distance=share)


def test_what_is_predicted_on_an_ignored_region_does_not_count():
    truth = lines(10).astype(float)
    truth[:, 24:34] = IGNORE
    predicted = logits(lines(10, 25, 33))
    assert f((predicted, truth)) == 100
    truth[:, 24:34] = 0
    assert f((predicted, truth)) == pytest.approx(100 * 2 * 17 / (3 * 17 + 17))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3), (30, 1)])
def test_the_smallest_images(shape):
    assert f((np.full(shape, -20.0), np.ones(shape))) == 0
    assert math.isnan(f((np.full(shape, -20.0), np.zeros(shape))))


# --- the parts --------------------------------------------------------------------------------------------------------


@given(arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 24))))
def test_thinning_is_scikit_image_s(image):
    np.testing.assert_array_equal(thin(image), skimage_thin(image))


@pytest.mark.parametrize("seed", range(4))
def test_thinning_of_large_shapes_is_scikit_image_s(seed):
    image = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(90, 120)), 1 + 2 * seed) > 0
    np.testing.assert_array_equal(thin(image), skimage_thin(image))


def within(found, truth, radius):
    """(found, true): which pixels are within reach of each other."""
    return np.linalg.norm(np.argwhere(found)[:, None] - np.argwhere(truth), axis=-1) <= radius


MAP = arrays(bool, (9, 12))


@given(MAP, MAP, MAP, st.sampled_from([0.5, 1, 1.5, 2, 5**0.5, 3, 20]))
def test_as_many_pairs_as_can_be(candidates, kept, truth, radius):
    found = candidates & kept
    near = within(found, truth, radius)
    want = (maximum_bipartite_matching(csr_array(near)) >= 0).sum() if near.size else 0
    assert Matcher(candidates, truth, radius).count(found) == want
    assert Matcher(truth, found, radius).count(truth) == want


def views(image):
    """An image, turned and mirrored in all eight ways."""
    for turns, mirrored in itertools.product(range(4), (False, True)):
        turned = np.rot90(image, turns)
        yield np.ascontiguousarray(turned.T if mirrored else turned)


@given(st.integers(0, 2**32 - 1), st.floats(0.7, 4), st.tuples(st.integers(2, 40), st.integers(2, 40)))
def test_suppression_does_not_depend_on_the_view(seed, scale, shape):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), scale)
    probability = 1 / (1 + np.exp(-scale * noise))
    for mine, view in zip(views(suppress(probability, 0.01)), views(probability), strict=True):
        np.testing.assert_allclose(mine, suppress(view, 0.01), rtol=0, atol=1e-9)


# --- maps like a network's --------------------------------------------------------------------------------------------


def predictions(size, count, noise=1.0, first=0):
    """(probabilities, edges) of rendered rooms: blurred and bent, some parts missing, false contours and noise."""
    rng = np.random.default_rng(first)
    draw = lambda shape, sigma: ndimage.gaussian_filter(rng.normal(size=shape), sigma) * sigma  # noqa: E731
    _, labels = render(range(first, first + count), size)
    for edges in labels["edges"][:, 0].numpy() == 1:
        seen = edges & (draw(edges.shape, 12) > -0.35)
        false = np.abs(draw(edges.shape, 6)) < 0.006
        strength = 4.5 * ndimage.gaussian_filter(seen.astype(float), 1.5)
        strength += 1.8 * ndimage.gaussian_filter(false.astype(float), 1.5)
        bend = np.stack([4.5 * draw(edges.shape, 8) for _ in range(2)])
        strength = ndimage.map_coordinates(strength, np.indices(edges.shape) + bend, order=1, mode="nearest")
        yield 1 / (1 + np.exp(4 - 6 * strength - 2 * noise * draw(edges.shape, 1))), edges


def test_neither_the_view_nor_the_cut_matters():
    # thinning itself prefers one side of a line two pixels wide: a pixel more or less in a view
    pairs = [(np.log(p / (1 - p)), y) for p, y in predictions((64, 64), 2)]
    whole = f(*pairs, max_distance=0.03)
    assert f(*pairs, max_distance=0.03, cut=1) == whole
    turned = [zip(views(p), views(y), strict=True) for p, y in pairs]
    seen = [f(*split, max_distance=0.03) for split in zip(*turned, strict=True)]
    assert len(seen) == 8 and min(seen) > 20 and max(seen) - min(seen) < 2


def pyedgeeval():
    """Its NMS imports OpenCV, which it does not install by itself."""
    pytest.importorskip("pyEdgeEval.preprocess", exc_type=ImportError)
    from pyEdgeEval._lib import correspond_pixels
    from pyEdgeEval.common.binary_label.evaluate_boundaries import evaluate_boundaries_threshold
    from pyEdgeEval.preprocess import binary_thin, fast_nms

    return fast_nms, binary_thin, correspond_pixels, evaluate_boundaries_threshold


@pytest.mark.parametrize("size", [(64, 64), (120, 160), (240, 320)])
def test_the_parts_are_pyedgeeval_s(size):
    fast_nms, binary_thin, correspond_pixels, _ = pyedgeeval()
    for share in (0.0075, 0.011):
        ((probability, truth),) = predictions(size, 1)
        strength = suppress(probability, THRESHOLDS[0])
        theirs = fast_nms(probability)
        np.testing.assert_allclose(strength, np.where(strength > 0, theirs, 0), atol=1e-12)
        assert not (theirs[strength == 0] >= THRESHOLDS[0]).any()
        matcher = Matcher(strength > 0, truth, share * float(np.hypot(*size)))
        for threshold in (0.05, 0.3, 0.7):
            found = thin(strength >= threshold)
            np.testing.assert_array_equal(found, binary_thin(theirs >= threshold))
            pairs = (correspond_pixels(found, truth, max_dist=share)[0] > 0).sum()
            assert 0 <= matcher.count(found) - pairs <= 2 + 0.002 * pairs  # theirs is random and misses some


@pytest.mark.parametrize(("size", "count", "share"), [((64, 64), 4, 0.03), ((120, 160), 1, 0.0075)])
def test_the_whole_is_pyedgeeval_s(size, count, share):
    *_, evaluate = pyedgeeval()
    images = list(predictions(size, count, first=20))
    count_r, sum_r, count_p, sum_p = sum(
        np.array(evaluate(THRESHOLDS, p, y, max_dist=share, apply_nms=True)) for p, y in images
    )
    recall, precision = count_r / sum_r, count_p / np.maximum(sum_p, 1)
    want = (2 * recall * precision / np.maximum(recall + precision, 1e-9)).max()
    assert f(*[(np.log(p / (1 - p)), y) for p, y in images], max_distance=share) / 100 == pytest.approx(want, abs=0.005)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_distance", [0, -0.1, 1, float("nan")])
def test_the_distance_is_a_share(max_distance):
    with pytest.raises(ValueError, match="max_distance must be a share"):
        BoundaryF(max_distance)
