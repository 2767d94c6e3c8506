"""A task that comes later has what another has, or nothing yet; nothing else changes by a bit."""

import copy
import warnings

import pytest
import torch
from torch import nn

import dtme
from dtme.blocks import find_blocks
from tests.dtme.clients import CLIENTS, TASKS, WIDTH, OwnTransformer, make_input, mixed_plan


def made(name="own, generic seam", plan=None, **options):
    torch.manual_seed(0)
    model = dtme.MultiTaskModel(CLIENTS[name](), {task: nn.Linear(WIDTH, 2) for task in TASKS}).double()
    dtme.expand(model, plan or mixed_plan(model), **options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".dtme." in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def head():
    return nn.Linear(WIDTH, 2).double()


def stepped(model, x, optimizer, tasks=None):
    optimizer.zero_grad()
    sum(p.square().mean() for p in model(x, tasks).values()).backward()
    optimizer.step()


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("modulator", ["affine", "batch_norm"])
def test_it_begins_like_another_and_leaves_the_others_alone(name, modulator):
    model, x = made(name, modulator=modulator), make_input(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    same_objects = dict(model.named_parameters())
    predicted = {task: model.eval()(x, task)[task] for task in TASKS}
    new = copy.deepcopy(model.heads["depth"])
    state = torch.get_rng_state()
    assert dtme.add_task(model, "edges", new, like="depth") is model
    assert torch.equal(torch.get_rng_state(), state)
    assert model.tasks == (*TASKS, "edges") and model.heads["edges"] is new
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(dict(model.named_parameters())[key] is parameter for key, parameter in same_objects.items())
    added = {key for key in after if key not in before and ".dtme." in key}
    assert added == {key.replace(".depth", ".edges") for key in before if ".dtme." in key and key.endswith(".depth")}
    for task in TASKS:
        assert torch.equal(model(x, task)[task], predicted[task])
    assert torch.equal(model(x, "edges")["edges"], predicted["depth"])
    assert dtme.verify(model, x) < 1e-12
    # a copy, not the same: training one leaves the other
    model(x, "edges")["edges"].square().sum().backward()
    assert all(p.grad is None for key, p in model.named_parameters() if key.endswith(".depth"))


def test_without_another_it_has_no_modules_until_the_next_plan(tmp_path):
    model, x = made(), make_input("own")
    dtme.add_task(model, "edges", head())
    assert not any(key.endswith(".edges") for key, _ in model.named_parameters())
    (first, *_) = find_blocks(model.backbone)
    with dtme.tasks(model.backbone, "edges"):
        tokens = model.backbone(x)
    twin = copy.deepcopy(model)
    dtme.collapse(twin)
    torch.testing.assert_close(tokens, twin.backbone(x), rtol=0, atol=1e-12)  # its attention is another kernel
    model.save_pretrained(tmp_path)
    again = dtme.MultiTaskModel.from_pretrained(
        tmp_path, OwnTransformer().double(), {task: head() for task in model.tasks}
    )
    for task, prediction in model(x).items():
        assert torch.equal(again(x)[task], prediction)
    dtme.replan(model, dtme.ExpansionPlan(model.tasks, 2, {first: ("edges",)}))
    assert f"backbone.{first}.dtme.weight.edges" in dict(model.named_parameters())


def test_of_a_group_it_gets_copies_of_its_own_and_gates_too():
    tasks, blocks = TASKS, ["layers.0", "layers.1"]
    plan = dtme.ExpansionPlan(tasks, 2, {blocks[0]: ("both",)}, {blocks[1]: ("both",)}, groups={"both": tasks[:2]})
    model, x = made(plan=dtme.ExpansionPlan(tasks, 2, {blocks[0]: tasks})), make_input("own")
    dtme.replan(model, plan, gate_tokens=True)
    gate = model.backbone.get_parameter("layers.1.dtme.gate.both")
    gate.data.fill_(0.7)
    want = model(x, tasks[0])[tasks[0]]
    dtme.add_task(model, "edges", copy.deepcopy(model.heads[tasks[0]]), like=tasks[0])
    assert model.backbone.get_parameter("layers.1.dtme.gate.edges").item() == 0.7
    assert torch.equal(model(x, "edges")["edges"], want)
    assert {p.shape for p in model.task_parameters("edges")} >= {(WIDTH,), (2, WIDTH), ()}


@pytest.mark.parametrize("like", [None, "depth"])
def test_the_optimizer_goes_on(like):
    model, x = made(), make_input("own")
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(one.parameter_groups(lr=1e-2)) for one in (model, twin)]
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 1, 0.5) for one in optimizers]
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        stepped(one, x, optimizer)
    dtme.add_task(model, "edges", head(), like=like, optimizer=optimizers[0])
    for one, optimizer, scheduler in zip((model, twin), optimizers, schedulers, strict=True):
        for _ in range(3):
            scheduler.step()
            stepped(one, x, optimizer, TASKS)
    wanted = twin.state_dict()
    for key, value in model.state_dict().items():
        if key in wanted:
            torch.testing.assert_close(value, wanted[key], rtol=1e-12, atol=1e-13, msg=key)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stepped(model, x, optimizers[0])
    held = [id(p) for group in optimizers[0].param_groups for p in group["params"]]
    assert len(set(held)) == len(held) == len(list(model.parameters()))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key in before if key.endswith("edges") or "heads.edges" in key} <= moved
    decays = {id(p): group["weight_decay"] for group in optimizers[0].param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        assert (decays[id(parameter)] == 0) == (".dtme." in key), key


def test_what_is_refused_leaves_everything_as_it_was():
    model = made()
    optimizer = torch.optim.SGD(model.parameter_groups())
    before, groups = (
        {k: v.clone() for k, v in model.state_dict().items()},
        [len(g["params"]) for g in optimizer.param_groups],
    )
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters())
    decoded = dtme.MultiTaskModel(OwnTransformer(), decoder=lambda features: features, tasks=TASKS)
    for arguments, error, said in (
        ((model, "depth", head()), ValueError, "must be unique"),
        ((model, "a.b", head()), ValueError, "without dots"),
        ((model, "edges", head(), "normal"), ValueError, "unknown task 'normal'"),
        ((model, "edges", "a head"), TypeError, "head must be a torch.nn.Module"),
        ((model.backbone, "edges", head()), TypeError, "must be a dtme.MultiTaskModel"),
        ((decoded, "edges", head()), RuntimeError, "decoder would have to predict it"),
        ((model, "edges", head(), "depth", stranger), ValueError, "holds none of the model's parameters"),
    ):
        with pytest.raises(error, match=said):
            dtme.add_task(*arguments)
    grouped = made(plan=dtme.ExpansionPlan(TASKS, 2, {"layers.0": ("edges",)}, groups={"edges": TASKS[:2]}))
    with pytest.raises(ValueError, match="edges"):
        dtme.add_task(grouped, "edges", head(), like="depth", optimizer=torch.optim.SGD(grouped.parameter_groups()))
    assert grouped.tasks == TASKS and set(grouped.heads) == set(TASKS)
    assert model.state_dict().keys() == before.keys() and model.tasks == TASKS
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [len(group["params"]) for group in optimizer.param_groups] == groups


def test_a_plain_model_gets_a_head():
    model = dtme.MultiTaskModel(OwnTransformer(), {task: nn.Linear(WIDTH, 2) for task in TASKS}, tasks=TASKS).eval()
    new = nn.Linear(WIDTH, 3)
    dtme.add_task(model, "edges", new, like="depth", optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert model.tasks == (*TASKS, "edges") and not new.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(torch.randn(2, 5, WIDTH))["edges"].shape == (2, 5, 3)


def test_what_is_made_in_inference_mode_can_be_trained():
    model = dtme.MultiTaskModel(OwnTransformer(), {task: nn.Linear(WIDTH, 2) for task in TASKS})
    head, blocks = nn.Linear(WIDTH, 2), {"layers.1": TASKS[:2]}
    with torch.inference_mode():
        dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, blocks, blocks))
        dtme.add_task(model, "edges", head, like=TASKS[0])
        dtme.replan(model, dtme.ExpansionPlan(model.tasks, 3, blocks, blocks), gate_tokens=True)
    sum(prediction.sum() for prediction in model(torch.randn(2, 5, WIDTH)).values()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".gate." in name)
