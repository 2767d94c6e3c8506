"""Every meter and loss against brute force over drawn shapes, holes, ties, dtypes and cuts into batches."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.paper import losses, metrics
from benchmarks.paper.data import fashion, nyud, pascal, rooms, taskonomy, wordnet

IGNORE = 255
cuts = st.lists(st.booleans(), min_size=3, max_size=3)


@st.composite
def splits(draw, channels, labels=None):
    """Predictions (4, channels, H, W) float32 of few different values, labels, and the batches they come in.

    ``labels``: how many classes; None for numbers.
    """
    shape = (4, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    prediction = random.integers(-3, 4, (4, channels, *shape[1:])) / draw(st.sampled_from((1, 2, 7)))
    hole = random.random(shape) < draw(st.sampled_from((0, 0.3, 1)))
    if labels:
        target = np.where(hole, IGNORE, random.integers(0, draw(st.integers(1, labels)), shape))
    else:
        target = random.integers(-3, 4, (4, channels, *shape[1:])) / 2.0
        target[np.broadcast_to(hole[:, None], target.shape)] = np.nan
    ends = [i + 1 for i, cut in enumerate(draw(cuts)) if cut]
    return prediction.astype(np.float32), target, np.split(np.arange(4), ends)


def measure(meter, prediction, target, batches, dtype=torch.float32):
    for rows in batches:
        meter.update(torch.tensor(prediction[rows]), torch.tensor(target[rows]).to(dtype))
        meter = pickle.loads(pickle.dumps(meter))
    return meter.compute()


def equal(got, want):
    assert got == pytest.approx(want, rel=1e-6, abs=1e-6, nan_ok=True)


def mean(values):
    return sum(values) / len(values) if values else math.nan


@given(splits(4, 4), st.sampled_from([torch.uint8, torch.int32, torch.int64, torch.float32]))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_mean_iou(case, dtype):
    prediction, target, batches = case
    pixels = [
        (int(p.argmax()), y) for p, y in zip(np.moveaxis(prediction, 1, 3).reshape(-1, 4), target.ravel(), strict=True)
    ]
    pixels = [pair for pair in pixels if pair[1] != IGNORE]
    ious = []
    for c in range(4):
        union = [p == y for p, y in pixels if c in (p, y)]
        ious += [100 * sum(union) / len(union)] if union else []
    equal(measure(metrics.MeanIoU(4), prediction, target, batches, dtype), mean(ious))


@given(splits(3, 3), st.sampled_from([torch.uint8, torch.int16, torch.int64]))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_accuracy(case, dtype):
    prediction, target, batches = case
    prediction, target = prediction[..., 0, 0], target[..., 0, 0]
    right = [100.0 * (p.argmax() == y) for p, y in zip(prediction, target, strict=True) if y != IGNORE]
    equal(measure(metrics.Accuracy(3), prediction, target, batches, dtype), mean(right))


@given(splits(1))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_errors_of_numbers(case):
    prediction, target, batches = case
    errors = [float(p) - float(y) for p, y in zip(prediction.ravel(), target.ravel(), strict=True) if not math.isnan(y)]
    equal(measure(metrics.L1Error(), prediction, target, batches), mean([abs(e) for e in errors]))
    equal(measure(metrics.RootMeanSquareError(), prediction, target, batches), mean([e * e for e in errors]) ** 0.5)
    deep = [
        (float(p) - float(y)) ** 2
        for p, y in zip(prediction.ravel(), np.nan_to_num(target).ravel(), strict=True)
        if y > 0
    ]
    equal(measure(metrics.DepthRMSE(), prediction, np.nan_to_num(target), batches), mean(deep) ** 0.5)


@given(splits(3))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_angles(case):
    prediction, target, batches = case
    angles, apart = [], []
    for p, y in zip(
        np.moveaxis(prediction, 1, 3).reshape(-1, 3), np.moveaxis(target, 1, 3).reshape(-1, 3), strict=True
    ):
        p, y = p.astype(float), y.astype(float)
        unit = p / max(np.linalg.norm(p), 1e-12)
        if not np.isnan(y).any():
            apart += list(np.abs(unit - y))
            if y.any():
                cross = np.linalg.norm(np.cross(unit, y))
                angles.append(math.degrees(math.atan2(cross, unit @ y)) if p.any() else 90.0)
    equal(measure(metrics.NormalsError(), prediction, np.nan_to_num(target), batches), mean(angles))
    equal(measure(metrics.DirectionL1(), prediction, target, batches), mean(apart))


@given(splits(2, 2), st.sampled_from(["plain", "invpt"]))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_max_f(case, mode):
    prediction, target, batches = case
    values = np.moveaxis(prediction, 1, 3).reshape(-1, 2).astype(float)
    pixels = [(1 / (1 + math.exp(a - b)), y) for (a, b), y in zip(values, target.ravel(), strict=True) if y != IGNORE]
    pixels = [(1 / (1 + math.exp(-q)) if mode == "invpt" else q, y) for q, y in pixels]
    best = math.nan if not pixels else 0.0
    for step in range(1, 20):
        found = [y for q, y in pixels if q > step / 20]
        truth = sum(y == 1 for _, y in pixels)
        if not found and not truth:
            continue
        right = sum(y == 1 for y in found)
        precision, recall = (right / len(found) if found else 0), (right / truth if truth else 0)
        f = 1.3 * precision * recall / (0.3 * precision + recall) if right else 0.0
        best = max(best, 100 * f)
    if pixels and not any(y == 1 for _, y in pixels) and not any(q > 0.05 for q, _ in pixels):
        best = math.nan
    equal(measure(metrics.MaxF(mode), prediction, target, batches, torch.int64), best)


@given(splits(1, 2), st.integers(0, 2), st.sampled_from([0.3, 0.5, 0.8]))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_edge_f(case, tolerance, threshold):
    prediction, target, batches = case
    found = {tuple(i) for i in np.argwhere(1 / (1 + np.exp(-prediction[:, 0].astype(float))) > threshold)}
    found = {at for at in found if target[at] != IGNORE}
    truth = {tuple(i) for i in np.argwhere(target == 1)}

    def near(one, others):
        return any(
            one[0] == at[0] and abs(one[1] - at[1]) <= tolerance and abs(one[2] - at[2]) <= tolerance for at in others
        )

    precision = sum(near(at, truth) for at in found) / max(len(found), 1)
    recall = sum(near(at, found) for at in truth) / max(len(truth), 1)
    want = 200 * precision * recall / (precision + recall) if precision * recall else 0.0
    want = want if found or truth else math.nan
    equal(measure(metrics.EdgeF(tolerance, threshold), prediction, target[:, None], batches), want)


@given(splits(2, 2), st.integers(0, 3))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_what_is_predicted_where_nothing_is_known_changes_nothing(case, seed):
    prediction, target, batches = case
    random = np.random.default_rng(seed)
    other = np.where((target == IGNORE)[:, None], random.normal(size=prediction.shape) * 50, prediction)
    other = other.astype(np.float32)
    for meter, score, y in (
        (lambda: metrics.MeanIoU(2), lambda x: x, target),
        (metrics.MaxF, lambda x: x, target),
        (metrics.L1Error, lambda x: x[:, :1], np.where(target == IGNORE, np.nan, target)[:, None]),
        (metrics.DepthRMSE, lambda x: x[:, :1], np.where(target == IGNORE, 0, target)[:, None]),
        (lambda: metrics.EdgeF(1), lambda x: x[:, :1], target[:, None]),
    ):
        equal(measure(meter(), score(other), y, batches), measure(meter(), score(prediction), y, batches))
    p, o = (torch.tensor(x) for x in (prediction, other))
    whole = torch.tensor(target)
    for loss in (losses.cross_entropy, losses.balanced_cross_entropy):
        equal(loss(p, whole).item(), loss(o, whole).item())
    equal(*(losses.edge_loss(x[:, :1], whole[:, None].float()).item() for x in (p, o)))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, -math.inf])
def test_a_depth_that_is_none_reaches_no_gradient(value):
    p = torch.tensor([[[[1.0, 2.0, 5.0]]]], requires_grad=True)
    loss = losses.depth_loss(p, torch.tensor([[[[3.0, value, 4.0]]]]))
    loss.backward()
    assert loss.item() == 1.5 and p.grad.flatten().tolist() == [-0.5, 0, 0.5]


@pytest.mark.parametrize(
    "loss",
    [losses.depth_loss, losses.l1_loss, losses.mse_loss, losses.edge_loss, losses.normals_loss, losses.cosine_loss],
)
@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 1, 1, 3), (1, 1, 3, 3), (2, 3, 3, 3)])
def test_what_would_only_be_broadcast_is_refused(loss, shape):
    """(2, 3, 3) against (2, 1, 3, 3) makes a loss over (2, 2, 3, 3): every image against every other."""
    with pytest.raises(ValueError, match=r"must have the same shape, got \(2, 1, 3, 3\) and \("):
        loss(torch.ones(2, 1, 3, 3), torch.ones(shape))


@pytest.mark.parametrize(
    "table", [nyud, pascal, rooms, taskonomy, fashion, wordnet], ids=lambda module: module.__name__
)
def test_directions_and_pickles_of_all_tables(table):
    """What is better is what the metric says: a perfect prediction beats a poor one in the direction of the table."""
    lower = {"RMSE", "mErr", "L1"}
    higher = {"mIoU", "maxF", "odsF", "F", "accuracy"}
    for name, task in table.TASKS.items():
        assert task.metric in (lower if task.lower_is_better else higher), name
        shape = (2, task.channels, 12, 12) if task.is_dense else (8, task.channels)
        generator = torch.Generator().manual_seed(0)
        if task.classes:
            y = torch.randint(0, task.channels, (shape[0], *shape[2:]), generator=generator)
            good = torch.nn.functional.one_hot(y, task.channels).movedim(-1, 1).float() * 9
        else:
            y = torch.rand(shape, generator=generator) + 0.1
            y = torch.nn.functional.normalize(y, dim=1) if task.channels == 3 else y
            good = y
            if "edge" in name:
                y = torch.zeros(shape)
                y[..., 6] = 1
                good = y * 20 - 10
        scores = []
        for prediction in (good, good.flip(0) if task.channels > 1 or not task.is_dense else good.flip(3) - 1):
            meter = pickle.loads(pickle.dumps(task.meter()))
            meter.update(prediction, y)
            scores.append(meter.compute())
        assert (scores[0] < scores[1]) == task.lower_is_better and scores[0] != scores[1], (name, scores)
