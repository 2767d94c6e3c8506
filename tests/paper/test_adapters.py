"""Rivals of equal size: right gradients, a start as the plain model, and the size of the reference plan."""

import copy
import json
import pickle

import pytest
import torch

from benchmarks.paper.structures import ARMS, OfEqualSize
from dtme.rivals import LoRA, NormAffine
from dtme.rivals.versions import with_copies, with_low_rank
from tests.paper.small import NAMES, backward, batches, small_model, small_setting

VERSIONS = ("lora", "bitfit", "norm-affine", "recon")
NORM, QUERY, BIAS = "layers.2.layernorm_before.weight", "layers.1.attention.q_proj.weight", "layers.4.mlp.fc2.bias"


# --- a version per task -----------------------------------------------------------------------------------------------


def shaken(model):
    """``model`` with versions that are no longer where they started."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.versions.parameters():
        noise = torch.empty(parameter.shape).uniform_(-0.1, 0.1, generator=generator)
        parameter.data += noise.to(parameter)
    return model


def loss_of(prediction):
    return (prediction + 0.5).square().mean()


def by_copied_models(model, x):
    """Losses and gradients of a plain loop: one whole model per task, whose parameters are that task's values."""
    losses, of_parameter, of_value = {}, {}, {}
    for task in model.tasks:
        single = copy.deepcopy(model.model)
        for name, value in model.values(task).items():
            single.backbone.get_parameter(name).data.copy_(value)
        single.requires_grad_(True)
        losses[task] = loss_of(single(x)[task])
        losses[task].backward()
        for name, parameter in single.named_parameters():
            if parameter.grad is not None:
                of_value[task, name] = parameter.grad
                of_parameter[name] = of_parameter.get(name, 0) + parameter.grad
    return losses, of_parameter, of_value


@pytest.mark.parametrize("kind", ["copies", "low rank"])
def test_gradients_are_those_of_a_loop_over_copied_models(kind):
    exact = {"atol": 1e-12, "rtol": 1e-12}
    plain = small_model().double().eval()
    if kind == "copies":
        model = shaken(with_copies(plain, [NORM, QUERY, BIAS]))
    else:
        model = shaken(with_low_rank(plain, {QUERY: 2, "layers.5.mlp.fc1.weight": 1}, seed=0))
    x = batches()[0][0].double()
    want, of_parameter, of_value = by_copied_models(model, x)
    losses = {task: loss_of(prediction) for task, prediction in model(x).items()}
    torch.stack(list(losses.values())).sum().backward()
    for task in model.tasks:
        torch.testing.assert_close(losses[task], want[task], **exact)
        for name, version in zip(model.names, model.versions[task].values(), strict=True):
            grad = of_value[task, f"backbone.{name}"]
            if kind == "copies":
                torch.testing.assert_close(version.value.grad, grad, **exact)
            else:  # of W + B A: dB = dW Aᵀ, dA = Bᵀ dW
                torch.testing.assert_close(version.up.grad, grad @ version.down.T, **exact)
                torch.testing.assert_close(version.down.grad, version.up.T @ grad, **exact)
    for name, parameter in model.model.named_parameters():
        if name.removeprefix("backbone.") in model.retired:
            assert parameter.grad is None and not parameter.requires_grad
        else:
            torch.testing.assert_close(parameter.grad, of_parameter[name], **exact)
    assert bool(model.retired) == (kind == "copies")


@pytest.mark.parametrize("name", VERSIONS)
def test_rivals_start_as_the_plain_model_train_and_survive_a_pickle(name):
    x, _ = batches()[0]
    want = small_model().eval()(x)
    model, facts = ARMS[name].structure().apply(small_setting())
    json.dumps(facts, allow_nan=False)
    for task, prediction in model.eval()(x).items():
        assert torch.equal(prediction, want[task])
    backward(model.train())
    for parameter in [p for group in model.parameter_groups() for p in group["params"]]:
        assert parameter.requires_grad and parameter.grad is not None and parameter.grad.isfinite().all()
    again = pickle.loads(pickle.dumps(model)).eval()(x)
    also = copy.deepcopy(model).eval()(x)
    for task, prediction in model.eval()(x).items():
        assert torch.equal(again[task], prediction) and torch.equal(also[task], prediction)


def test_prompts_train_and_differ_by_little_at_first():
    x, _ = batches()[0]
    want = small_model().eval()(x)
    model, facts = ARMS["prompts"].structure().apply(small_setting())
    json.dumps(facts, allow_nan=False)
    assert facts["plan"]["num_tokens"] == 4 and len(facts["plan"]["expansion"]) == 6 and not facts["plan"]["modulation"]
    for task, prediction in model.eval()(x).items():
        assert 0 < (prediction - want[task]).norm() < 0.5 * want[task].norm()
    backward(model.train())
    assert all(p.grad.any() for name, p in model.named_parameters() if ".dtme." in name)


def test_a_tasks_prediction_does_not_depend_on_which_are_asked_for():
    model = shaken(with_copies(small_model().eval(), [NORM, BIAS]))
    x, _ = batches()[0]
    everything = model(x)
    assert list(everything) == list(NAMES) == list(model.tasks)
    assert list(model(x, ["depth", "semseg"])) == ["depth", "semseg"]
    for task in NAMES:
        assert torch.equal(model(x, task)[task], everything[task])
    assert len({round(everything[task].std().item(), 6) for task in NAMES}) == 3
    with pytest.raises(ValueError, match="unknown task 'parts'"):
        model(x, "parts")


@pytest.mark.parametrize("name", VERSIONS)
def test_parameters_are_shared_or_a_tasks_or_retired(name):
    model, facts = ARMS[name].structure().apply(small_setting())
    shared, own = model.shared_parameters(), [p for task in model.tasks for p in model.task_parameters(task)]
    retired = [model.model.backbone.get_parameter(each) for each in model.retired]
    parts = [id(p) for p in (*shared, *own, *retired)]
    assert sorted(parts) == sorted(id(p) for p in model.parameters())
    assert sum(p.numel() for p in retired) == facts["retired"]
    base, added = model.parameter_groups(lr=0.5, weight_decay=0.25)
    assert (base["weight_decay"], added["weight_decay"], added["lr"]) == (0.25, 0, 0.5)
    assert sum(p.numel() for p in added["params"]) == facts["added"]
    trained = {id(p) for group in (base, added) for p in group["params"]}
    assert trained == {id(p) for p in (*shared, *own)}
    per_task = {sum(p.numel() for p in model.versions[task].parameters()) for task in model.tasks}
    assert per_task == {facts["added"] // len(NAMES)}


def test_training_moves_the_tasks_apart_and_leaves_what_is_retired():
    model = with_copies(small_model(), [NORM])
    before = model.model.backbone.get_parameter(NORM).clone()
    optimizer = torch.optim.Adam(model.parameter_groups(lr=1e-3))
    for batch in batches()[:2]:
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    assert torch.equal(model.model.backbone.get_parameter(NORM), before)
    first, second, third = (model.values(task)[NORM] for task in model.tasks)
    assert not torch.equal(first, second) and not torch.equal(second, third)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_no_size_is_refused():
    with pytest.raises(ValueError, match="adds nothing"):
        OfEqualSize(LoRA).apply(small_setting(modulation=0, expansion=0))


def test_the_budget_is_that_of_the_reference_plan():
    for options in ({}, {"num_tokens": 1}, {"modulation": 1.0, "expansion": 1 / 3}):
        made = small_setting(**options)
        _, facts = OfEqualSize(NormAffine).apply(small_setting(**options))
        plan, _ = ARMS["tm+te"].structure().plan(made)
        assert facts["budget"] == made.budget == plan.added_parameters()
