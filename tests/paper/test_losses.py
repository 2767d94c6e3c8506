"""Every loss against its formula by hand, and zero with a graph where nothing is valid."""

import numpy as np
import pytest
import torch

from benchmarks.paper import losses
from benchmarks.paper.data import nyud, pascal
from benchmarks.paper.data.rooms import TASKS
from benchmarks.rooms.labels import CLASSES, IGNORE

RNG = np.random.default_rng(0)
CLASS_TASKS = [task for task, info in TASKS.items() if info.classes]
UNKNOWN = dict.fromkeys(TASKS, IGNORE) | {"depth": 0, "normals": 0, "albedo": np.nan}
"""What a target holds where nothing is labelled."""


def example(task):
    """Prediction (2, C, 5, 6), and a target of which about a third is invalid."""
    channels = TASKS[task].channels
    prediction, hole = RNG.normal(size=(2, channels, 5, 6)), RNG.random((2, 5, 6)) < 0.35
    if task in CLASS_TASKS:
        return prediction, np.where(hole, IGNORE, RNG.integers(0, channels, (2, 5, 6)))
    if task == "edges":
        return prediction, np.where(hole, IGNORE, RNG.random((2, 5, 6)) < 0.3)[:, None].astype(float)
    target = RNG.normal(size=(2, channels, 5, 6))
    target = target / np.linalg.norm(target, axis=1, keepdims=True) if task == "normals" else np.abs(target)
    return prediction, np.where(hole[:, None], UNKNOWN[task], target)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def by_hand(task, p, y):
    if task in CLASS_TASKS:
        valid = y != IGNORE
        loss = -np.take_along_axis(log_softmax(p), np.where(valid, y, 0)[:, None], 1)[:, 0][valid]
        if task == "saliency":
            positive = (y[valid] == 1).mean()
            loss = loss * np.where(y[valid] == 1, 1 - positive, positive)
        return loss.mean()
    if task == "edges":
        valid, q = y != IGNORE, 1 / (1 + np.exp(-p))
        return -(0.95 * y * np.log(q) + 0.05 * (1 - y) * np.log(1 - q))[valid].mean()
    if task == "normals":
        valid = (y != 0).any(1)
        return np.abs(p / np.linalg.norm(p, axis=1, keepdims=True) - y).sum(1)[valid].mean()
    return np.abs(p - y)[~np.isnan(y) if task == "albedo" else y > 0].mean()


def tensors(task, prediction, target):
    return (
        torch.tensor(prediction, dtype=torch.float32, requires_grad=True),
        torch.tensor(target, dtype=torch.int64 if task in CLASS_TASKS else torch.float32),
    )


@pytest.mark.parametrize("task", TASKS)
def test_matches_the_formula(task):
    arrays = example(task)
    p, y = tensors(task, *arrays)
    loss = TASKS[task].loss(p, y)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(task, *arrays), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, p)
    invalid = y.isnan().all(1) if task == "albedo" else (y == UNKNOWN[task]).reshape(2, -1, 5, 6).all(1)
    assert gradient.movedim(1, -1)[invalid.reshape(2, 5, 6)].abs().max() == 0 and gradient.abs().max() > 0


@pytest.mark.parametrize("task", TASKS)
def test_nothing_valid_is_zero_with_a_graph(task):
    prediction, target = example(task)
    p, y = tensors(task, prediction, np.full_like(target, UNKNOWN[task]))
    loss = TASKS[task].loss(p, y)
    loss.backward()
    assert loss.item() == 0 and (p.grad == 0).all()


@pytest.mark.parametrize("task", TASKS)
def test_half_precision_predictions_are_scored_in_float32(task):
    p, y = tensors(task, *example(task))
    half = p.detach().bfloat16()
    assert TASKS[task].loss(half, y).item() == TASKS[task].loss(half.float(), y).item()


def test_one_class_alone_weighs_nothing():
    p, y = torch.randn(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 4, 4, dtype=torch.int64)
    assert TASKS["saliency"].loss(p, y).item() == 0


def test_a_task_for_every_label():
    assert TASKS.keys() == CLASSES.keys()


def of_values(prediction, target):
    """Taskonomy's L1, mean square and 1 - cos, of float64 arrays with NaN where nothing is known."""
    known = ~np.isnan(target)
    difference = (prediction - target)[known]
    length = np.linalg.norm(prediction, axis=1) * np.linalg.norm(target, axis=1)
    cosine = (prediction * target).sum(1) / np.where(length == 0, np.nan, length)
    return {
        losses.l1_loss: np.abs(difference).mean(),
        losses.mse_loss: (difference**2).mean(),
        losses.cosine_loss: np.nanmean(1 - cosine),
    }


@pytest.fixture
def values():
    """Predictions and targets (2, 3, 5, 6) of which some pixels, and one vector of zeros, are unknown."""
    rng = np.random.default_rng(1)
    prediction, target = rng.normal(size=(2, 2, 3, 5, 6))
    target[:, :, rng.random((5, 6)) < 0.3] = np.nan
    return prediction, target


@pytest.mark.parametrize("loss", [losses.l1_loss, losses.mse_loss, losses.cosine_loss])
def test_values_that_are_unknown_do_not_count(loss, values):
    p, y = (torch.tensor(array, dtype=torch.float32) for array in values)
    p.requires_grad_()
    value = loss(p, y)
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(of_values(*values)[loss], rel=1e-5)
    (gradient,) = torch.autograd.grad(value, p)
    unknown = y.isnan()
    assert (gradient[unknown] == 0).all() and gradient[~unknown].abs().min() > 0
    assert loss(p.bfloat16(), y).item() == loss(p.bfloat16().float(), y).item()


@pytest.mark.parametrize("loss", [losses.l1_loss, losses.mse_loss, losses.cosine_loss])
def test_no_value_known_is_zero_with_a_graph(loss):
    p = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = loss(p, torch.full((2, 3, 4, 4), torch.nan))
    value.backward()
    assert value.item() == 0 and (p.grad == 0).all()


def test_cosine_is_over_channels():
    """Turned by 60° at one pixel, right at the other, and no direction at the third; lengths do not matter."""
    turned = torch.tensor([0.5, 3**0.5 / 2, 0])
    p = torch.stack([5 * turned, torch.tensor([0.0, 0.1, 0]), torch.ones(3)], 1).view(1, 3, 1, 3)
    y = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [0, 0, 0]]).T.reshape(1, 3, 1, 3)
    assert losses.cosine_loss(p, y).item() == pytest.approx((0.5 + 0) / 2, abs=1e-6)


def test_the_weights_of_invpt():
    weights = {"semseg": 1, "parts": 2, "saliency": 5, "normals": 10, "edge": 50, "depth": 1}
    for tasks in (nyud.TASKS, pascal.TASKS):
        assert {name: task.weight for name, task in tasks.items()} == {name: weights[name] for name in tasks}
