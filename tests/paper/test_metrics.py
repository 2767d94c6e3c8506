"""Every meter against a plain loop, over batches cut anywhere, and with nothing to count."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.paper.data.rooms import TASKS
from benchmarks.paper.metrics import (
    Accuracy,
    BoundaryF,
    DepthRMSE,
    EdgeF,
    L1Error,
    MaxF,
    MeanIoU,
    NormalsError,
    RootMeanSquareError,
)
from benchmarks.paper.tasks import lower_is_better
from benchmarks.rooms.labels import IGNORE

LOWER_IS_BETTER = lower_is_better(TASKS)

RNG = np.random.default_rng(0)


def example(task, count=6):
    """A prediction and labels, some of them none, of a task of the rooms or, other than dense, of texts."""
    if task == "topic":
        return RNG.normal(size=(count, 4)), np.where(RNG.random(count) < 0.2, IGNORE, RNG.integers(0, 4, count))
    if task == "height":
        prediction, target = RNG.normal(size=(2, count, 3))
        return prediction, np.where(RNG.random(target.shape) < 0.2, np.nan, target)
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


def accuracy(p, y):
    return 100 * (p.argmax(1) == y)[y != IGNORE].mean()


CASES = {
    "mean IoU": ("semseg", lambda: MeanIoU(15), iou),
    "RMSE": ("depth", DepthRMSE, lambda p, y: math.sqrt(((p - y)[y > 0] ** 2).mean())),
    "mean angle": ("normals", NormalsError, angle),
    "edge F": ("edges", EdgeF, edge_f),
    "edge F, same pixel": ("edges", lambda: EdgeF(0), lambda p, y: edge_f(p, y, 0)),
    "edge F, other threshold": ("edges", lambda: EdgeF(1, 0.3), lambda p, y: edge_f(p - math.log(3 / 7), y)),
    "maxF": ("saliency", MaxF, max_f),
    "accuracy": ("topic", lambda: Accuracy(4), accuracy),
    "mean error": ("height", L1Error, lambda p, y: np.nanmean(np.abs(p - y))),
    "root of mean square": ("height", RootMeanSquareError, lambda p, y: np.sqrt(np.nanmean((p - y) ** 2))),
    "maxF, InvPT": ("saliency", lambda: MaxF("invpt"), lambda p, y: max_f(p, y, True)),
}


def tensors(task, prediction, target):
    whole = task == "topic" or (task in TASKS and TASKS[task].classes)
    return torch.tensor(prediction), torch.tensor(target, dtype=torch.int64 if whole else torch.float64)


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
    nothing = np.full_like(target, {"depth": 0, "normals": 0, "albedo": np.nan}.get(task, IGNORE))
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


@pytest.mark.parametrize("task", ["semseg", "topic", "height"])
def test_it_is_torchmetrics_s(task):
    from torchmetrics import MeanAbsoluteError, MeanSquaredError
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    ours, theirs, scale = {
        "semseg": ([MeanIoU(15)], [MulticlassJaccardIndex(15, ignore_index=IGNORE)], 100),
        "topic": ([Accuracy(4)], [MulticlassAccuracy(4, average="micro", ignore_index=IGNORE)], 100),
        "height": ([L1Error(), RootMeanSquareError()], [MeanAbsoluteError(), MeanSquaredError(squared=False)], 1),
    }[task]
    for seed in range(3):
        p, y = tensors(task, *example(task))
        if task == "semseg":  # classes that are only in one of the two, or in none
            y[y == 4] = IGNORE
            p[:, 4 + seed] = -9
        for meter in ours:
            meter.update(p, y)
        valid = ~y.isnan()
        for meter in theirs:
            meter.update(*((p[valid], y[valid]) if task == "height" else (p, y)))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.compute() == pytest.approx(scale * other.compute().item(), rel=1e-5)


def test_a_missed_and_an_empty_map_score_zero():
    y = torch.zeros(1, 1, 4, 4)
    y[..., 1] = 1
    for p in (torch.full_like(y, -1), y.flip(-1) * 2 - 1):
        meter = EdgeF(0)
        meter.update(p, y)
        assert meter.compute() == 0


# --- a split in parts: saved in the middle, or shared by processes ----------------------------------------------------


ALL = CASES | {"boundary F": ("edges", lambda: BoundaryF(0.2), None)}
WORLD = 2


@pytest.mark.parametrize("case", ALL)
def test_a_copy_saved_in_the_middle_of_a_split_goes_on(case):
    task, make, _ = ALL[case]
    p, y = tensors(task, *example(task))
    whole, first = make(), make()
    whole.update(p, y)
    first.update(p[:2], y[:2])
    rest = pickle.loads(pickle.dumps(first))
    rest.update(p[2:], y[2:])
    assert rest.compute() == pytest.approx(whole.compute(), rel=1e-12)
    first.update(p[2:], y[2:])
    assert first.compute() == rest.compute()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ALL)
def test_of_an_empty_batch_nothing_comes_and_any_precision_goes(case, dtype):
    task, make, _ = ALL[case]
    p, y = tensors(task, *example(task))
    p = p.to(dtype)
    want, meter = make(), make()
    want.update(p.double(), y)
    meter.update(p[:0], y[:0])
    assert math.isnan(meter.compute())
    meter.update(p.requires_grad_(), y if task in ("semseg", "topic", "saliency") else y.float())
    assert meter.compute() == pytest.approx(want.compute(), rel=1e-6)


def splits():
    """case -> (prediction, target) of five items, the same in every process."""
    global RNG
    RNG = np.random.default_rng(1)
    return {case: tensors(task, *example(task, 5)) for case, (task, _, _) in ALL.items()}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        found = {}
        for case, (p, y) in splits().items():
            meter = ALL[case][1]()
            meter.update(p[rank::WORLD], y[rank::WORLD])
            meter.all_reduce_()
            found[case] = meter.compute()
        Path(f"{folder}/{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def test_two_processes_with_a_shard_each_have_the_metric_of_the_split(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), WORLD)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD))
    assert first == second
    for case, (p, y) in splits().items():
        meter = ALL[case][1]()
        meter.update(p, y)
        meter.all_reduce_()  # nothing to sum over
        assert first[case] == pytest.approx(meter.compute(), rel=1e-12)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", ALL)
def test_a_prediction_that_is_no_number_names_the_meter_and_leaves_the_sums(case, value):
    task, make, _ = ALL[case]
    p, y = tensors(task, *example(task))
    meter = make()
    meter.update(p, y)
    before = meter.compute()
    p.view(-1)[7] = value
    with pytest.raises(ValueError, match=f"^{type(meter).__name__}: 1 of {p.numel()} predictions are NaN or infinite"):
        meter.update(p, y)
    assert meter.compute() == before


@pytest.mark.parametrize("case", ALL)
def test_shapes_that_do_not_fit_name_the_meter(case):
    task, make, _ = ALL[case]
    p, y = tensors(task, *example(task))
    wrong = [(p[:1], y), (p, y[:1]), (p[..., None], y), (p, y[None]), (p[..., :-1], y)]
    wrong += [(p[:, :0], y)] + ([(p, y[..., :-1])] if y.ndim > 1 else [])
    for prediction, target in wrong:
        with pytest.raises(ValueError, match=f"^{type(make()).__name__}: prediction and target must "):
            make().update(prediction, target)


@pytest.mark.parametrize("label", [-1, 20, 254, 256])
@pytest.mark.parametrize("case", ["mean IoU", "accuracy", "maxF", "edge F", "boundary F"])
def test_a_label_that_is_none_is_named(case, label):
    task, make, _ = ALL[case]
    p, y = tensors(task, *example(task))
    y.view(-1)[3] = label
    with pytest.raises(ValueError, match=f"labels must be 0 to .* got {label}$"):
        make().update(p, y)


def test_an_edge_that_is_half_one_is_no_label():
    p, y = tensors("edges", *example("edges"))
    y[0, 0, 2, 2] = 0.5
    with pytest.raises(ValueError, match=r"^EdgeF: labels must be 0 to 1, or 255 for none, got 0\.5"):
        EdgeF().update(p, y)


@pytest.mark.parametrize(("case", "value"), [("RMSE", math.inf), ("mean angle", math.nan), ("mean error", math.inf)])
def test_a_target_that_is_no_number_is_an_error(case, value):
    task, make, _ = ALL[case]
    p, y = tensors(task, *example(task))
    y.view(-1)[3] = value
    with pytest.raises(ValueError, match="a target is NaN or infinite"):
        make().update(p, y)


@pytest.mark.parametrize("classes", [0, 1, 256])
def test_as_many_classes_as_labels_can_name(classes):
    with pytest.raises(ValueError, match=f"classes must be 2 to 255.*got {classes}"):
        MeanIoU(classes)
