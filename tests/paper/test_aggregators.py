"""Every aggregator against its paper's formula, through a step of a model with shared and own parameters."""

import pickle
from functools import partial
from itertools import permutations, product

import numpy as np
import pytest
import torch
from cvxpy.lin_ops import lin_utils
from scipy.optimize import minimize
from torchjd import aggregation
from torchjd.autojac import backward, jac_to_grad

import dtme
from benchmarks.paper.combinations import ARMS, Aggregated
from benchmarks.paper.combinations.aggregators import NashMTL, mgda

from .toy_tasks import (
    gradients,
    shared_gradient,
    task,
    token_batch,
    token_tasks,
    transformer,
    with_gradients,
)

NAMES = ["graddrop", "mgda", "pcgrad", "cagrad", "imtl", "aligned", "nash", "config"]
TWO = np.array([[1.0, 2.0, 0.5], [-2.0, 0.5, 1.0]])  # conflicting
THREE = np.array([[1.0, 0.2, 0.4], [-0.5, 2.0, 0.3], [0.3, -0.6, 1.5]])
PLANE = np.array([[1.0, 0.2], [-0.7, 1.5], [-0.1, -0.4]])


def combined(name, rows):
    return shared_gradient(ARMS[name].combination, rows).numpy()


def test_mgda_is_the_shortest_convex_combination():
    first, second = TWO
    share = np.clip((second - first) @ second / ((second - first) ** 2).sum(), 0, 1)
    assert 0 < share < 1
    np.testing.assert_allclose(combined("mgda", TWO), share * first + (1 - share) * second, atol=1e-9)
    np.testing.assert_allclose(combined("mgda", [first, 3 * first]), first, atol=1e-9)  # γ = 1: the shorter
    best = minimize(
        lambda weights: ((weights @ THREE) ** 2).sum(),
        np.full(3, 1 / 3),
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        tol=1e-12,
    )
    np.testing.assert_allclose(combined("mgda", THREE), best.x @ THREE, atol=0.03)  # Frank-Wolfe ends early


def project(gradient, others):
    for other in others:
        if gradient @ other < 0:
            gradient = gradient - gradient @ other / (other @ other) * other
    return gradient


def test_pcgrad_is_the_sum_of_projections():
    first, second = TWO
    assert first @ second < 0
    expected = project(first, [second]) + project(second, [first])
    np.testing.assert_allclose(combined("pcgrad", TWO), expected, atol=1e-12)
    np.testing.assert_allclose(combined("pcgrad", np.abs(TWO)), np.abs(TWO).sum(0), atol=1e-12)


def test_pcgrad_draws_the_order_of_projections():
    rows = np.array([[1.0, 0.2, 0.0], [-0.9, 0.8, 0.1], [-0.3, -0.7, 0.5]])
    orders = [list(permutations([row for other, row in enumerate(rows) if other != i])) for i in range(3)]
    possible = [sum(project(rows[i], order) for i, order in enumerate(choice)) for choice in product(*orders)]
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        distances = np.abs(np.array(possible) - combined("pcgrad", rows)).max(1)
        assert distances.min() < 1e-12
        seen.add(int(distances.argmin()))
    assert len(seen) > 2


def test_cagrad_is_best_for_the_worst_task_in_a_ball_around_the_mean():
    mean, result = PLANE.mean(0), combined("cagrad", PLANE)
    radius = 0.4 * np.linalg.norm(mean)
    assert np.linalg.norm(result - mean) <= radius * (1 + 1e-6)
    angles, lengths = np.meshgrid(np.linspace(0, 2 * np.pi, 2001), np.linspace(0, radius, 101))
    ball = mean + np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], -1)
    best = (ball @ PLANE.T).min(-1).max()
    assert best > (PLANE @ mean).min() + 0.01  # more than the mean itself gives
    assert (PLANE @ result).min() == pytest.approx(best, abs=1e-4)


def test_imtl_has_equal_projections_on_unit_gradients_and_weights_that_sum_up_to_one():
    result = combined("imtl", THREE)
    projections = THREE @ result / np.linalg.norm(THREE, axis=1)
    np.testing.assert_allclose(projections, projections[0], atol=1e-9)
    assert np.linalg.solve(THREE.T, result).sum() == pytest.approx(1)


def test_aligned_is_the_mean_of_gradients_whose_singular_values_are_the_smallest():
    left, values, right = np.linalg.svd(THREE)
    aligned = values.min() * left @ right
    assert np.linalg.cond(THREE) > 1.5 and np.linalg.cond(aligned) == pytest.approx(1)
    np.testing.assert_allclose(combined("aligned", THREE), aligned.mean(0), atol=1e-9)


def test_nash_is_the_fixed_point_shortened_to_one():
    result = combined("nash", THREE)
    assert np.linalg.norm(result) == pytest.approx(1, abs=1e-6)
    weights = np.linalg.solve(THREE.T, result)
    products = weights * (THREE @ THREE.T @ weights)  # GᵀGα = 1/α, up to the scale of α
    assert (weights > 0).all()
    np.testing.assert_allclose(products / products.mean(), 1, atol=0.02)


def test_graddrop_keeps_the_gradients_of_one_sign_as_often_as_their_share():
    columns = np.array([[3.0, 1.0, -2.0, 0.0], [-1.0, 2.0, -1.0, 0.0], [0.5, -3.0, -0.5, 0.0]])
    draws = 4000
    torch.manual_seed(0)
    result = combined("graddrop", np.repeat(columns, draws, axis=1)).reshape(4, draws)
    for column, drawn in zip(columns.T, result, strict=True):
        positive, negative = column.clip(min=0).sum(), column.clip(max=0).sum()
        share = positive / (positive - negative) if column.any() else 0.0
        assert np.isin(drawn.round(9), [positive, negative]).all()
        if 0 < share < 1:
            assert (drawn > 0).mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / draws))


def test_config_has_equal_cosines_and_the_length_of_all_projections():
    result = combined("config", THREE)
    direction = result / np.linalg.norm(result)
    cosines = THREE @ direction / np.linalg.norm(THREE, axis=1)
    assert cosines[0] > 0
    np.testing.assert_allclose(cosines, cosines[0], atol=1e-9)
    assert np.linalg.norm(result) == pytest.approx((THREE @ direction).sum())


@pytest.mark.parametrize("scale", [2.0**-40, 1e-6, 1e5])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_size_are_combined_alike(name, scale):
    """Of small ones CAGrad would else make nothing at all."""
    torch.manual_seed(0)
    expected = combined(name, THREE) * (1 if name == "nash" else scale)
    torch.manual_seed(0)
    np.testing.assert_allclose(combined(name, THREE * scale), expected, rtol=1e-3)
    assert np.abs(expected).max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_one_task_is_trained_on_its_gradient(name):
    factor = {"cagrad": 1.4, "nash": 1 / np.linalg.norm(TWO[0])}.get(name, 1)  # 1 + c; length 1
    np.testing.assert_allclose(combined(name, TWO[:1]), factor * TWO[0], rtol=1e-4)


def expanded(names):
    """Some blocks have modulations, one tokens as well, and a shared weight is frozen."""
    model = transformer(names, dropout=0.0)
    plan = dtme.ExpansionPlan(tuple(names), 2, {"layers.0": tuple(names)}, {"layers.0": tuple(names[:2])})
    dtme.expand(model, plan)
    model.backbone.layers[1].linear1.weight.requires_grad_(False)
    model.backbone.unused = torch.nn.Parameter(torch.ones(3))
    return model


@pytest.mark.parametrize("make", ["MGDA", "IMTLG", "ConFIG", "Sum"])
def test_it_is_what_torchjd_makes_of_shared_parameters(make):
    names = ["a", "b", "c"]
    tasks, batch = token_tasks(names), token_batch(names)
    model, other = expanded(names), expanded(names)
    Aggregated(tasks, lambda rows: getattr(aggregation, make)()).step(model, batch, tasks)

    predictions = other(batch[0])
    losses = [tasks[name].loss(predictions[name], batch[1][name]) for name in names]
    shared = [p for p in other.shared_parameters() if p.requires_grad]
    own = [p for name in names for p in other.task_parameters(name)]
    backward(losses, inputs=shared, retain_graph=True, parallel_chunk_size=1)
    jac_to_grad(shared, getattr(aggregation, make)())
    torch.stack(losses).sum().backward(inputs=own)
    expected = gradients(other)
    assert expected.pop("backbone.unused").abs().max() < 1e-6  # here it has none, as in plain training
    found = gradients(model)
    assert found.keys() == expected.keys() and "backbone.layers.0.dtme.tokens.a" in found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_nothing_shared_is_trained():
    names = ["a", "b"]
    tasks, model = token_tasks(names), transformer(names)
    model.backbone.requires_grad_(False)
    Aggregated(tasks, mgda).step(model, token_batch(names), tasks)
    assert {name.split(".")[0] for name in gradients(model)} == {"heads"}
    for head in model.heads.values():
        head.requires_grad_(False)
    model.backbone.layers[0].norm1.requires_grad_(True)
    model.zero_grad()
    Aggregated(tasks, mgda).step(model, token_batch(names), tasks)
    assert set(gradients(model)) == {"backbone.layers.0.norm1.weight", "backbone.layers.0.norm1.bias"}


def test_no_gradient_at_all_is_no_step():
    assert not np.any(combined("mgda", np.zeros((2, 3))))


def steep(prediction, target):
    return (prediction - prediction.detach()).abs().sqrt().sum() + 1  # 1, with a gradient that is NaN


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_names_its_task(name):
    tasks, model, batch = with_gradients(THREE)
    tasks["b"] = task(steep)
    with pytest.raises(FloatingPointError, match=r"gradient of 'b' is not finite"):
        ARMS[name].combination(tasks).step(model, batch, tasks)
    assert model.shared.grad is None


def too_many_weights(rows):
    return aggregation.Constant(torch.ones(rows + 1))


def infinite_weights(rows):
    return aggregation.Constant(torch.full((rows,), torch.inf, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"), [(too_many_weights, "of a, b failed: "), (infinite_weights, "of a, b is not finite")]
)
def test_a_failure_names_the_aggregator(make, message):
    with pytest.raises(FloatingPointError, match=f"{make.__name__} of the gradients {message}"):
        shared_gradient(partial(Aggregated, make=make), TWO)


def test_nash_falls_back_on_the_last_weights():
    """Opposite gradients have no bargain."""
    tasks, model, batch = with_gradients(np.eye(2))
    combination = ARMS["nash"].combination(tasks)
    combination.step(model, batch, tasks)
    _, model, batch = with_gradients([[1.0, 0.0], [-1.0, 0.0]])
    assert combination.facts() == {"unsolved_steps": 0}
    combination.step(model, batch, tasks)
    np.testing.assert_allclose(model.shared.grad, 0, atol=1e-3)
    assert combination.facts() == {"unsolved_steps": 1}


def test_nash_is_taken_up_where_the_numbers_of_cvxpy_begin_anew(monkeypatch):
    """As they do in another process. torchjd's own goes on with wrong weights from most of these numbers."""
    matrices = torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(0))
    for first in (4, 11, 16, 23, 28, 30):
        monkeypatch.setattr(lin_utils.ID_COUNTER, "count", first + 1)
        aggregator = NashMTL(4)
        aggregator(matrices[0])
        saved = pickle.dumps(aggregator)
        expected = [aggregator(matrix) for matrix in matrices[1:]]
        monkeypatch.setattr(lin_utils.ID_COUNTER, "count", 1)
        aggregator = pickle.loads(saved)
        for matrix, combined in zip(matrices[1:], expected, strict=True):
            assert torch.equal(aggregator(matrix), combined)
