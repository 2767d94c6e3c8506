"""The optimizer of a model that goes on with another plan: which group new parameters join, and what schedulers do."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler

import dtme
from tests.dtme.clients import TASKS
from tests.dtme.test_replan import NEW, OLD, OWN, A, B, added, everything, is_same, train

NOTHING = dtme.ExpansionPlan(TASKS, 2)
SCHEDULERS = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / 10) ** 0.9),
    "polynomial": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 10, 0.9),
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10),
}


def values(group):
    return {key: value for key, value in group.items() if key not in ("params", "param_names", "weight_decay")}


def advance(optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.step()
        scheduler.step()


def test_new_parameters_join_the_group_of_their_kind_and_task(build):
    model, _ = build(OWN)
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {A: TASKS}, {A: TASKS}))
    parameters = dict(model.named_parameters())
    rest = [(n, p) for n, p in parameters.items() if ".dtme." not in n]
    by_task = [[(n, p) for n, p in parameters.items() if ".dtme." in n and n.endswith(task)] for task in TASKS]
    optimizer = torch.optim.SGD([{"params": rest}, *({"params": some} for some in by_task)], lr=0.1)
    dtme.replan(model, dtme.ExpansionPlan(TASKS, 2, {B: TASKS}, {B: TASKS}), optimizer)
    for task, group in zip(TASKS, optimizer.param_groups[1:], strict=True):
        want = {n: p for n, p in model.named_parameters() if ".dtme." in n and n.endswith(task)}
        assert len(want) == 3 and dict(zip(group["param_names"], group["params"], strict=True)).keys() == want.keys()
        assert all(want[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    by_kind = {k: [p for n, p in model.named_parameters() if f".dtme.{k}." in n] for k in ("weight", "bias", "tokens")}
    optimizer = torch.optim.SGD([{"params": some} for some in by_kind.values()], lr=0.1)
    dtme.replan(model, NEW, optimizer)
    for kind, group in zip(by_kind, optimizer.param_groups, strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for n, p in model.named_parameters() if f".dtme.{kind}." in n}


def test_without_a_group_of_added_parameters_one_is_made_and_an_emptied_one_used_again(build):
    model, x = build(OWN)
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2))
    targets = {task: torch.randn_like(out) for task, out in model(x).items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1)
    with pytest.warns(UserWarning, match="new one with the present values of group 0"):
        dtme.replan(model, NEW, optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    train(model, optimizer, x, targets)
    dtme.replan(model, dtme.ExpansionPlan(TASKS, 2), optimizer)
    assert not optimizer.param_groups[1]["params"] and not added(model)
    train(model, optimizer, x, targets)
    dtme.replan(model, OLD, optimizer)
    assert len(optimizer.param_groups) == 2 and len(optimizer.param_groups[1]["params"]) == len(added(model))
    train(model, optimizer, x, targets)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_where_the_first_plan_was_empty(build, name):
    model, _ = build(OWN)
    assert len(model.parameter_groups()) == 1
    dtme.expand(model, NOTHING)
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2))
    scheduler = SCHEDULERS[name](optimizer)
    advance(optimizer, scheduler, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dtme.replan(model, NEW, optimizer)
    advance(optimizer, scheduler, 4)
    groups = optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [1e-6, 0] and values(groups[0]) == values(groups[1])
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in added(model).values()}


def test_new_parameters_join_a_group_without_weight_decay(build):
    model, _ = build(OWN)
    dtme.expand(model, NOTHING)
    flat = [p for p in model.backbone.parameters() if p.ndim < 2]
    heads, deep = list(model.heads.parameters()), [p for p in model.backbone.parameters() if p.ndim > 1]
    groups = [{"params": deep, "weight_decay": 0.1}, {"params": heads, "lr": 1.0}, {"params": flat, "lr": 1e-4}]
    groups.append({"params": [torch.nn.Parameter(torch.ones(9**4))]})  # another model's
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dtme.replan(model, NEW, optimizer)
    assert len(optimizer.param_groups) == 4
    assert {id(p) for p in optimizer.param_groups[2]["params"]} == {id(p) for p in [*flat, *added(model).values()]}
    advance(optimizer, scheduler, 1)
    dtme.replan(model, NOTHING, optimizer)
    strange = torch.optim.Adam([{"params": deep, "weight_decay": 0.1}, groups[3]])
    with pytest.warns(UserWarning, match="present values of group 0"):
        dtme.replan(model, NEW, strange)
    assert len(strange.param_groups) == 3 and len(strange.param_groups[1]["params"]) == 1


@pytest.mark.parametrize("named", [False, True])
def test_a_new_group_has_the_present_values_of_that_of_most_of_the_backbone(build, named):
    model, _ = build(OWN)
    dtme.expand(model, NOTHING)
    some = (model.heads.named_parameters, model.backbone.named_parameters)
    if not named:
        some = (model.heads.parameters, model.backbone.parameters)
    optimizer = torch.optim.AdamW(
        [{"params": list(one()), "lr": lr} for one, lr in zip(some, (1.0, 1e-3), strict=True)]
    )
    scheduler = lr_scheduler.OneCycleLR(optimizer, [1.0, 1e-2], total_steps=10)
    advance(optimizer, scheduler, 3)
    before = everything(model, optimizer)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=r"values of group 1\. .*last_epoch"):
        warnings.simplefilter("error")
        dtme.replan(model, NEW, optimizer)
    assert is_same(before, everything(model, optimizer))
    with pytest.warns(UserWarning, match="without weight decay") as caught:
        dtme.replan(model, NEW, optimizer)
    assert caught[0].filename == __file__
    _, backbone, new = optimizer.param_groups
    assert new["weight_decay"] == 0 and values(new) == values(backbone) and new["max_lr"] == 1e-2
    assert {id(p) for p in new["params"]} == {id(p) for p in added(model).values()}
    assert not named or len(new["param_names"]) == len(new["params"])
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step, last_epoch=scheduler.last_epoch)
    advance(optimizer, scheduler, 2)
    assert new["lr"] == backbone["lr"]
