"""What holds for every arm: it goes on where it was, lets absent tasks be, refuses losses that are no numbers."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dtme
from benchmarks.paper.arms import Plain
from benchmarks.paper.combinations import ARMS

from .toy_tasks import gradients, task, token_batch, token_tasks, train, transformer

ARM = pytest.mark.parametrize("arm", ARMS)
NAMES = ["a", "b", "c"]
ROOT = Path(__file__).parents[2]
EPOCH = {"dwa": 1, "igb": 1}
"""Steps of an epoch, so short that weights change within six steps."""


def start(arm, names=NAMES, seed=0):
    tasks, model = token_tasks(names), transformer(names, seed=seed)
    combination = ARMS[arm].combination(tasks)
    if arm in EPOCH:
        combination.epoch = EPOCH[arm]
    combination.prepare(model)
    groups = model.parameter_groups(lr=0.01)
    if own := list(combination.parameters()):
        groups.append({"params": own})
    torch.manual_seed(1)
    return tasks, model.train(), combination, torch.optim.Adam(groups)


def batches(count, names=NAMES):
    """Every third lacks the labels of a task."""
    return [token_batch(names, seed, absent=names[:1] if seed % 3 == 1 else ()) for seed in range(count)]


def state(model, combination):
    """Whatever the next step depends on, as bytes of numbers."""
    return [value.clone() for value in (*model.state_dict().values(), *combination.state_dict().values())]


def assert_equal(one, other):
    assert len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_names_titles_and_structures():
    assert {"single", "joint"} <= set(ARMS)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in ARMS)
    assert len({arm.title for arm in ARMS.values()}) == len(ARMS)
    assert all(arm.structure is Plain and arm.is_single == (name == "single") for name, arm in ARMS.items())
    pickle.dumps(ARMS)


def test_joint_training_is_the_sum_of_the_losses():
    tasks, model, combination, _ = start("joint")
    other, batch = copy.deepcopy(model), token_batch(NAMES)
    losses = combination.step(model, batch, tasks)
    torch.manual_seed(1)
    predictions = other(batch[0])
    expected = {name: tasks[name].loss(predictions[name], batch[1][name]) for name in NAMES}
    sum(expected.values()).backward()
    assert losses == {name: loss.detach() for name, loss in expected.items()}
    assert not any(loss.requires_grad for loss in losses.values())
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, gradients(other)[name])


@ARM
def test_a_run_is_repeated_and_taken_up_from_a_pickle(arm):
    tasks, model, combination, optimizer = start(arm)
    first = state(model, combination)
    train(model, combination, optimizer, tasks, batches(6))
    unbroken = state(model, combination)
    assert any(not torch.equal(x, y) for x, y in zip(first, unbroken, strict=True))

    tasks, model, combination, optimizer = start(arm)
    train(model, combination, optimizer, tasks, batches(6)[:3])
    saved, random = pickle.dumps((model, combination, optimizer)), torch.get_rng_state()
    torch.rand(7)
    model, combination, optimizer = pickle.loads(saved)
    torch.set_rng_state(random)
    train(model, combination, optimizer, tasks, batches(6)[3:])
    assert_equal(state(model, combination), unbroken)


CONTINUE = """
import pickle, sys, torch
from benchmarks.clients import import_torchvision
import_torchvision()
torch.set_num_threads(1)
from tests.paper.test_combinations import batches, state, token_tasks, train, NAMES
for arm in sys.argv[2:]:
    model, combination, optimizer, random = pickle.load(open(f"{sys.argv[1]}/{arm}", "rb"))
    torch.set_rng_state(random)
    train(model, combination, optimizer, token_tasks(NAMES), batches(6)[3:])
    torch.save(state(model, combination), f"{sys.argv[1]}/{arm}.end")
"""


def test_another_process_takes_a_run_up(tmp_path):
    arms, threads = [arm for arm in ARMS if arm != "single"], torch.get_num_threads()
    torch.set_num_threads(1)
    ends = {}
    for arm in arms:
        tasks, model, combination, optimizer = start(arm)
        train(model, combination, optimizer, tasks, batches(6)[:3])
        with (tmp_path / arm).open("wb") as file:
            pickle.dump((model, combination, optimizer, torch.get_rng_state()), file)
        train(model, combination, optimizer, tasks, batches(6)[3:])
        ends[arm] = state(model, combination)
    torch.set_num_threads(threads)
    subprocess.run([sys.executable, "-c", CONTINUE, str(tmp_path), *arms], cwd=ROOT, check=True, timeout=120)
    for arm in arms:
        assert_equal(torch.load(tmp_path / f"{arm}.end"), ends[arm])


def no_graph(prediction, target):
    return torch.zeros(())


@pytest.mark.parametrize("has_graph", [True, False])
@ARM
def test_an_absent_task_takes_no_part(arm, has_graph):
    """The step is that of the others alone."""
    batch = token_batch(NAMES, absent=["b"])
    tasks, model, combination, _ = start(arm)
    if not has_graph:
        tasks["b"] = task(no_graph)
    losses = combination.step(model, batch, tasks)
    assert losses["b"] == 0
    tasks, other, combination, _ = start(arm)
    others = {name: tasks[name] for name in NAMES if name != "b"}
    torch.manual_seed(1)
    ARMS[arm].combination(others).step(other, batch, others)
    found, expected = gradients(model), gradients(other)
    for name in expected:
        assert found[name].abs().max() > 0 or "norm" in name or "bias" in name
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)
    assert all(name.startswith("heads.b") and not found[name].any() for name in found.keys() - expected.keys())


@ARM
def test_a_task_that_never_has_labels_does_not_spoil_the_others(arm):
    tasks, model, combination, optimizer = start(arm)
    absent = [token_batch(NAMES, seed, absent=["c"]) for seed in range(5)]
    nothing = [token_batch(NAMES, 9, absent=NAMES)]
    train(model, combination, optimizer, tasks, absent + nothing + batches(3))
    assert all(value.isfinite().all() for value in state(model, combination))


def not_a_number(prediction, target):
    return tokens_sum(prediction) * torch.nan


def infinite(prediction, target):
    return tokens_sum(prediction).square() / 0


def tokens_sum(prediction):
    return prediction.sum()


@pytest.mark.parametrize(("loss", "value"), [(not_a_number, "nan"), (infinite, "inf")])
@ARM
def test_a_loss_that_is_not_finite_names_its_task(arm, loss, value):
    tasks, model, combination, optimizer = start(arm)
    train(model, combination, optimizer, tasks, batches(1))
    optimizer.zero_grad()
    before = state(model.backbone, combination)
    tasks["b"] = task(loss)
    with pytest.raises(FloatingPointError, match=f"^the loss of 'b' is {value}$"):
        combination.step(model, token_batch(NAMES), tasks)
    assert not gradients(model)
    assert_equal(state(model.backbone, combination), before)


def expand(model):
    names = tuple(NAMES)
    plan = dtme.ExpansionPlan(names, 2, {"layers.0": names}, {"layers.1": names})
    return dtme.expand(model, plan)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "rep-mtl"])
def test_an_expanded_model_is_trained(arm):
    tasks, model, combination, _ = start(arm)
    expand(model)
    combination.prepare(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.linear1" not in name)
    combination.step(model, token_batch(NAMES), tasks)
    found = gradients(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == trainable and "backbone.layers.1.dtme.tokens.c" in found
    for name, gradient in found.items():
        assert gradient.isfinite().all()
        if "dtme" in name:
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("arm", [arm for arm in ARMS if not ARMS[arm].combination(token_tasks(NAMES)).one_device_only])
def test_means_of_devices_are_the_gradient_of_the_whole_batch(arm):
    """Of arms that do not say otherwise."""
    batch = token_batch(NAMES)
    halves = [(batch[0][part], {name: label[part] for name, label in batch[1].items()}) for part in ([0, 1], [2, 3])]
    found = []
    for some in ([batch], halves):
        sums = {}
        for part in some:
            tasks, model, combination, _ = start(arm)
            model.eval()  # batch norms would see another batch
            combination.step(model, part, tasks)
            for name, parameter in (*gradients(model).items(), *gradients(combination).items()):
                sums[name] = sums.get(name, 0) + parameter / len(some)
        found.append(sums)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


def test_arms_that_need_the_whole_batch_say_why():
    on_several = {arm for arm in ARMS if not ARMS[arm].combination(token_tasks(NAMES)).one_device_only}
    assert on_several == {"single", "joint", "invpt-weights", "uw"}


@ARM
def test_facts_are_what_json_holds(arm):
    tasks, model, combination, optimizer = start(arm)
    train(model, combination, optimizer, tasks, batches(3))

    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            for inner in value.values():
                check(inner)
        else:
            assert value is None or type(value) in (int, float, str)

    check(combination.facts())
