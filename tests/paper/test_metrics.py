"""Every meter against a plain loop, over batches cut anywhere, and with nothing to count."""

import math

import numpy as np
import pytest
import torch

from benchmarks.paper.data.rooms import TASKS
from benchmarks.paper.metrics import DepthRMSE, EdgeF, MaxF, MeanIoU, NormalsError, delta_m
from benchmarks.paper.tasks import lower_is_better
from benchmarks.rooms.labels import IGNORE

LOWER_IS_BETTER = lower_is_better(TASKS)

RNG = np.random.default_rng(0)


def example(task, count=6):
    channels, shape = TASKS[task].channels, (count, 7, 9)
    prediction, hole = RNG.normal(size=(count, channels, 7, 9)), RNG.random(shape) < 0.2
    if TASKS[task].classes:
        return prediction, np.where(hole, IGNORE, RNG.integers(0, channels, shape))
    if task == "edges":
        return prediction - 1, np.where(hole, IGNORE, RNG.random(shape) < 0.2)[:, None].astype(float)
    target = RNG.normal(size=(count, channels, 7, 9))
    target = np.abs(target) if task == "depth" else target / np.linalg.norm(target, axis=1, keepdims=True)
    return prediction, target * ~hole[:, None]


def iou(p, y):
    p, valid, classes = p.argmax(1), y != IGNORE, p.shape[1]
    ious = []
    for c in range(classes):
        union = ((p == c) | (y == c)) & valid
        if union.any():
            ious.append(((p == c) & (y == c) & valid).sum() / union.sum())
    return 100 * np.mean(ious)


def angle(p, y):
    valid = (y != 0).any(1)
    cosine = (p * y).sum(1) / np.linalg.norm(p, axis=1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))[valid].mean()


def near(a, tolerance):
    out = np.zeros_like(a)
    for n, c, i, j in zip(*np.nonzero(a), strict=True):
        out[n, c, max(i - tolerance, 0) : i + tolerance + 1, max(j - tolerance, 0) : j + tolerance + 1] = True
    return out


def edge_f(p, y, tolerance=1):
    found, truth = (p > 0) & (y != IGNORE), y == 1
    precision = (found & near(truth, tolerance)).sum() / found.sum()
    recall = (truth & near(found, tolerance)).sum() / truth.sum()
    return 100 * 2 * precision * recall / (precision + recall)


def max_f(p, y, again=False):
    q = 1 / (1 + np.exp(p[:, 0] - p[:, 1]))
    q = 1 / (1 + np.exp(-q)) if again else q
    valid, best = y != IGNORE, 0.0
    for threshold in np.arange(1, 20) / 20:
        found, truth = (q > threshold) & valid, (y == 1) & valid
        right = (found & truth).sum()
        if right:
            precision, recall = right / found.sum(), right / truth.sum()
            best = max(best, 1.3 * precision * recall / (0.3 * precision + recall))
    return 100 * best


CASES = {
    "mean IoU": ("semseg", lambda: MeanIoU(15), iou),
    "RMSE": ("depth", DepthRMSE, lambda p, y: math.sqrt(((p - y)[y > 0] ** 2).mean())),
    "mean angle": ("normals", NormalsError, angle),
    "edge F": ("edges", EdgeF, edge_f),
    "edge F, same pixel": ("edges", lambda: EdgeF(0), lambda p, y: edge_f(p, y, 0)),
    "edge F, other threshold": ("edges", lambda: EdgeF(1, 0.3), lambda p, y: edge_f(p - math.log(3 / 7), y)),
    "maxF": ("saliency", MaxF, max_f),
    "maxF, InvPT": ("saliency", lambda: MaxF("invpt"), lambda p, y: max_f(p, y, True)),
}


def tensors(task, prediction, target):
    return torch.tensor(prediction), torch.tensor(target, dtype=torch.int64 if TASKS[task].classes else torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_matches_a_plain_loop_however_the_split_is_cut(case):
    task, make, naive = CASES[case]
    arrays = example(task)
    prediction, target = tensors(task, *arrays)
    for cut in ([6], [1, 5], [2, 2, 2]):
        meter = make()
        for p, y in zip(prediction.split(cut), target.split(cut), strict=True):
            meter.update(p, y)
        assert meter.compute() == pytest.approx(naive(*arrays), rel=1e-6)
    meter.reset()
    meter.update(prediction[:2], target[:2])
    assert meter.compute() == pytest.approx(naive(arrays[0][:2], arrays[1][:2]), rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_to_count_is_nan(task):
    meter = TASKS[task].meter()
    assert math.isnan(meter.compute())
    prediction, target = example(task)
    nothing = np.full_like(target, 0 if task in ("depth", "normals") else IGNORE)
    meter.update(*tensors(task, prediction, nothing))
    assert math.isnan(meter.compute())


@pytest.mark.parametrize("task", TASKS)
def test_a_perfect_prediction(task):
    _, target = example(task)
    y = tensors(task, target, target)[1]
    if TASKS[task].classes:
        p = torch.nn.functional.one_hot(y.clamp(max=TASKS[task].channels - 1)).movedim(-1, 1) * 20.0
    else:
        p = (y - 0.5) * 20 if task == "edges" else y
    meter = TASKS[task].meter()
    meter.update(p, y)
    assert meter.compute() == pytest.approx(0 if task in LOWER_IS_BETTER else 100, abs=1e-6)


def test_absent_classes_are_left_out_and_invented_ones_are_not():
    y, p = torch.zeros(1, 1, 4, dtype=torch.int64), torch.zeros(1, 5, 1, 4)
    p[:, 0] = 1
    meter = MeanIoU(5)
    meter.update(p, y)
    assert meter.compute() == 100
    p[0, 3, 0, 0] = 2  # one pixel of a class that no target has: IoU 3/4 and 0
    meter.reset()
    meter.update(p, y)
    assert meter.compute() == pytest.approx(37.5)


def test_mean_iou_is_torchmetrics_s():
    try:
        from torchmetrics.classification import MulticlassJaccardIndex
    except Exception as error:  # it imports torchvision, which raises what it likes where its build is not torch's
        pytest.skip(f"torchmetrics does not import here: {error}")
    ours, theirs = MeanIoU(15), MulticlassJaccardIndex(15, ignore_index=IGNORE)
    for seed in range(3):
        p, y = tensors("semseg", *example("semseg"))
        y[y == 4] = IGNORE
        p[:, 4 + seed] = -9
        ours.update(p, y)
        theirs.update(p.float(), y)
    assert ours.compute() == pytest.approx(100 * theirs.compute().item(), rel=1e-5)


def test_a_missed_and_an_empty_map_score_zero():
    y = torch.zeros(1, 1, 4, 4)
    y[..., 1] = 1
    for p in (torch.full_like(y, -1), y.flip(-1) * 2 - 1):
        meter = EdgeF(0)
        meter.update(p, y)
        assert meter.compute() == 0


def test_delta_m():
    total, terms = delta_m({"semseg": 44.0, "depth": 0.55}, {"semseg": 40.0, "depth": 0.5}, {"depth"})
    assert terms == {"semseg": pytest.approx(10), "depth": pytest.approx(-10)}
    assert total == pytest.approx(0)


@pytest.mark.parametrize(
    ("results", "baseline", "says"),
    [({"a": 1.0}, {"b": 1.0}, "same tasks"), ({}, {}, "same tasks"), ({"a": 1.0}, {"a": 0.0}, "zero.*'a'")],
)
def test_delta_m_names_the_culprit(results, baseline, says):
    with pytest.raises(ValueError, match=says):
        delta_m(results, baseline, LOWER_IS_BETTER)
