"""IGB's weights by hand."""

import numpy as np
import pytest
import torch

from benchmarks.paper.combinations import ImprovableGaps

from .toy_tasks import with_gradients

ROWS = np.array([[1.0, 0.2, 0.4], [-0.5, 2.0, 0.3], [0.3, -0.6, 1.5]])


def step(combination, losses):
    """A loss of None has no labels. Returns the gradient of the shared numbers."""
    tasks, model, batch = with_gradients(ROWS, [1.0 if loss is None else loss for loss in losses])
    for name, loss in zip(tasks, losses, strict=True):
        batch[1][name] *= torch.nan if loss is None else 1.0
    combination.step(model, batch, tasks)
    return model.shared.grad.numpy()


def softmax(values):
    return np.exp(values) / np.exp(values).sum()


def test_weights_follow_the_gaps_to_the_second_epoch():
    combination = ImprovableGaps(with_gradients(ROWS)[0], epoch=2)
    history = np.random.default_rng(0).uniform(3, 9, (8, 3))
    base = history[2:4].mean(0)
    for number, losses in enumerate(history):
        weights = np.ones(3) if number < 4 else 3 * softmax(losses / base)
        np.testing.assert_allclose(step(combination, losses), (weights / losses) @ ROWS, rtol=1e-5)
        assert list(combination.facts()["weights"].values()) == pytest.approx(list(weights), rel=1e-5)
        if number < 3:
            assert set(combination.facts()["base_losses"].values()) == {None}
    assert list(combination.facts()["base_losses"].values()) == pytest.approx(list(base), rel=1e-6)


def test_an_absent_task_takes_no_part():
    combination = ImprovableGaps(with_gradients(ROWS)[0], epoch=2)
    for losses in ([4, 5, 6], [4, 5, 6], [3, None, 4], [5, None, None]):
        step(combination, losses)
    assert combination.facts()["base_losses"] == {"a": 4.0, "b": None, "c": 4.0}
    weights = 2 * softmax(np.array([2 / 4, 8 / 4]))
    np.testing.assert_allclose(step(combination, [2, None, 8]), weights[0] / 2 * ROWS[0] + weights[1] / 8 * ROWS[2])
    # the first labels later are the base
    weights = 3 * softmax(np.array([2 / 4, 1.0, 8 / 4]))
    np.testing.assert_allclose(step(combination, [2, 7, 8]), (weights / [2, 7, 8]) @ ROWS, rtol=1e-5)
    weights = 3 * softmax(np.array([2 / 4, 6 / 7, 8 / 4]))
    np.testing.assert_allclose(step(combination, [2, 6, 8]), (weights / [2, 6, 8]) @ ROWS, rtol=1e-5)
    assert np.abs(step(combination, [None] * 3)).max() == 0


def test_a_negative_loss_is_refused():
    with pytest.raises(ValueError, match="loss of 'c' is -1"):
        step(ImprovableGaps(with_gradients(ROWS)[0]), [3, 3, -1])
