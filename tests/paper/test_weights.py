"""Weights of losses against their formulas by hand, over several steps of training."""

import numpy as np
import pytest
import torch

from benchmarks.paper.combinations import (
    DynamicWeightAverage,
    FastAdaptiveWeights,
    FixedWeights,
    UncertaintyWeights,
)
from benchmarks.paper.combinations.weights import undisturbed

from .toy_tasks import OWN_GRADIENT, Point, task, token_batch, token_tasks, train, transformer, with_gradients

ROWS = np.array([[1.0, 0.2, 0.4], [-0.5, 2.0, 0.3], [0.3, -0.6, 1.5]])
LOSSES = np.array([3.0, 0.5, 7.0])


def softmax(values):
    return np.exp(values - values.max()) / np.exp(values - values.max()).sum()


def gradients_of(combination, losses, rows=ROWS):
    """Of the shared and of the own parameters, over those of the losses: (numbers,), (K,)."""
    tasks, model, batch = with_gradients(rows, losses)
    combination.step(model, batch, tasks)
    own = [(p.grad / OWN_GRADIENT).mean().item() / (i + 1) for i, p in enumerate(model.own.values())]
    combination.after(model, batch, tasks)
    return model.shared.grad.numpy(), np.array(own)


def check_weights(combination, losses, weights):
    shared, own = gradients_of(combination, losses)
    np.testing.assert_allclose(shared, weights @ ROWS, rtol=1e-5)
    np.testing.assert_allclose(own, weights, rtol=1e-5)
    assert list(combination.facts()["weights"].values()) == pytest.approx(list(weights), rel=1e-5)


def tasks_of(rows=ROWS):
    return with_gradients(rows)[0]


def test_fixed_weights_are_those_of_the_tasks():
    check_weights(FixedWeights(tasks_of()), LOSSES, np.array([2.0, 3.0, 4.0]))


def test_uncertainty_weights_and_their_gradients():
    tasks, model, batch = with_gradients(ROWS, LOSSES)
    combination = UncertaintyWeights(tasks)
    rate = 0.05
    optimizer = torch.optim.SGD([*model.parameters(), *combination.parameters()], lr=rate)
    shared, own, logs = np.zeros(3), [np.zeros(2) for _ in ROWS], np.zeros(3)
    targets = [label[:-1].numpy() for label in batch[1].values()]
    offsets = [label[-1].item() for label in batch[1].values()]
    for losses in train(model, combination, optimizer, tasks, [batch] * 5):
        differences = [np.concatenate([shared, o]) - t for o, t in zip(own, targets, strict=True)]
        values = np.array([0.5 * (d @ d) + offset for d, offset in zip(differences, offsets, strict=True)])
        np.testing.assert_allclose([loss.item() for loss in losses.values()], values, rtol=1e-6)
        weights = 0.5 * np.exp(-logs)
        shared = shared - rate * sum(w * d[:3] for w, d in zip(weights, differences, strict=True))
        own = [o - rate * w * d[3:] for o, w, d in zip(own, weights, differences, strict=True)]
        logs = logs - rate * (0.5 - weights * values)
    np.testing.assert_allclose(combination.scalarizer.log_var.detach(), logs, rtol=1e-5)
    np.testing.assert_allclose(model.shared.detach(), shared, rtol=1e-5)
    assert (np.sign(logs) == np.sign(LOSSES - 1)).all()


def test_uncertainty_of_an_absent_task_stays():
    tasks, model, batch = with_gradients(ROWS, LOSSES)
    batch[1]["b"] *= torch.nan
    combination = UncertaintyWeights(tasks)
    combination.step(model, batch, tasks)
    gradient = combination.scalarizer.log_var.grad
    assert gradient[1] == 0 and (gradient[[0, 2]] != 0).all()


def test_dynamic_weight_average():
    combination = DynamicWeightAverage(tasks_of(), epoch=2)
    history = np.random.default_rng(0).uniform(1, 8, (9, 3))
    for step, losses in enumerate(history):
        epoch = step // 2
        weights = np.ones(3)
        if epoch >= 2:
            means = history[: epoch * 2].reshape(epoch, 2, 3).mean(1)
            weights = 3 * softmax(means[-1] / means[-2] / 2)
            assert np.ptp(weights) > 0.01
        check_weights(combination, losses, weights)


def test_absent_tasks_keep_their_loss_in_the_means_of_dwa():
    combination = DynamicWeightAverage(tasks_of(), epoch=1)
    for present, losses in (([1, 1, 1], [4.0, 2, 8]), ([1, 0, 1], [2.0, 0, 8]), ([1, 1, 1], [1.0, 5, 8])):
        tasks, model, batch = with_gradients(ROWS, losses)
        for name, is_present in zip(tasks, present, strict=True):
            batch[1][name] *= 1.0 if is_present else torch.nan
        combination.step(model, batch, tasks)
        combination.after(model, batch, tasks)
    expected = 3 * softmax(np.array([2 / 4, 2 / 2, 8 / 8]) / 2)
    np.testing.assert_allclose(list(combination.facts()["weights"].values()), expected, rtol=1e-6)


def test_famo():
    tasks, model, batch = with_gradients(ROWS, LOSSES + 3)
    combination = FastAdaptiveWeights(tasks)
    optimizer = torch.optim.SGD([*model.parameters(), *combination.parameters()], lr=0.1)
    logits, mean, square = np.zeros(3), np.zeros(3), np.zeros(3)
    for step in range(1, 6):
        before = np.array([loss.item() for loss in train_once(model, combination, optimizer, tasks, batch).values()])
        z = softmax(logits)
        weights = z / before / (z / before).sum()
        np.testing.assert_allclose(list(combination.facts()["weights"].values()), weights, rtol=1e-5)
        predictions = model()
        after = np.array([tasks[name].loss(predictions[name], batch[1][name]).item() for name in tasks])
        fallen = np.log(before + 1e-8) - np.log(after + 1e-8)
        gradient = z * (fallen - z @ fallen) + 0.001 * logits
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        logits = logits - 0.025 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        (found,) = combination.parameters()
        np.testing.assert_allclose(found.detach(), logits, rtol=1e-4)
        assert found.grad is None
    assert np.ptp(logits) > 0.1


def train_once(model, combination, optimizer, tasks, batch):
    (losses,) = train(model, combination, optimizer, tasks, [batch])
    return losses


def test_famo_weighs_those_present_as_if_they_were_alone():
    tasks, model, batch = with_gradients(ROWS, LOSSES + 3)
    batch[1]["b"] *= torch.nan
    combination = FastAdaptiveWeights(tasks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_once(model, combination, optimizer, tasks, batch)
    weights = np.array([1 / 6, 1 / 10]) / (1 / 6 + 1 / 10)
    np.testing.assert_allclose(list(combination.facts()["weights"].values()), [weights[0], 0, weights[1]], rtol=1e-6)
    (logits,) = combination.parameters()
    assert abs(logits[1]) < 1e-6 and logits[[0, 2]].abs().min() > 0.02
    assert combination.before is None

    nothing = {name: label * torch.nan for name, label in batch[1].items()}
    kept = logits.detach().clone()
    train_once(model, combination, optimizer, tasks, (None, nothing))
    assert (logits - kept).abs().max() < 0.03 and logits.isfinite().all()  # Adam's momentum alone


def test_famo_runs_a_batch_again_without_a_trace():
    names = ["a", "b"]
    tasks, batch, model = token_tasks(names), token_batch(names), transformer(names)
    model.train()
    combination = FastAdaptiveWeights(tasks)
    combination.step(model, batch, tasks)
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert kept["heads.a.norm.num_batches_tracked"] == 1
    state = torch.get_rng_state()
    combination.after(model, batch, tasks)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())
    with pytest.raises(RuntimeError, match="call step, then after"):
        combination.after(model, batch, tasks)


def test_what_was_disturbed_is_mended_after_an_error_too():
    model = torch.nn.BatchNorm1d(3)
    state = torch.get_rng_state()
    with pytest.raises(KeyError), undisturbed(model):
        model(torch.randn(4, 3))
        raise KeyError
    assert model.num_batches_tracked == 0 and model.running_mean.abs().max() == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_famo_refuses_a_negative_loss():
    tasks, model, batch = with_gradients(ROWS, [1.0, -1.0, 2.0])
    with pytest.raises(ValueError, match="loss of 'b' is -1"):
        FastAdaptiveWeights(tasks).step(model, batch, tasks)


def test_a_loss_that_is_no_number_after_the_step_names_its_task():
    tasks = {"a": task(lambda prediction, target: torch.log(prediction + 1).square().sum() + 1)}
    model = Point(["a"], 1)
    combination = FastAdaptiveWeights(tasks)
    combination.step(model, (None, {"a": None}), tasks)
    with torch.no_grad():
        model.shared.fill_(-2)
    with pytest.raises(FloatingPointError, match="the loss of 'a' is nan"):
        combination.after(model, (None, {"a": None}), tasks)
