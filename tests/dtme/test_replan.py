"""Going on with another plan: what stays keeps everything, what is new changes nothing that it must not."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import dtme
from dtme.blocks import find_blocks
from tests.dtme.clients import CLIENTS, TASKS, WIDTH, OwnTransformer, same_predictions

A, B, C = "layers.0", "layers.1", "layers.2"
OWN = "own, generic seam"
OLD = dtme.ExpansionPlan(TASKS, 2, {A: TASKS, B: TASKS}, {B: ("depth", "normals"), C: TASKS})
NEW = dtme.ExpansionPlan(TASKS, 2, {B: ("depth",), C: TASKS}, {A: ("semseg",), B: TASKS, C: ("semseg",)})


def plans(model):
    """``OLD`` and ``NEW`` in the names of another backbone's blocks."""
    names = dict(zip((A, B, C), find_blocks(model.backbone), strict=True))
    return tuple(
        dtme.ExpansionPlan(
            TASKS, 2, *({names[b]: t for b, t in part.items()} for part in (plan.modulation, plan.expansion))
        )
        for plan in (OLD, NEW)
    )


def added(model):
    return {name.removeprefix("backbone."): p for name, p in model.named_parameters() if ".dtme." in name}


def train(model, optimizer, x, targets, steps=3):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum((out - targets[task]).square().mean() for task, out in model(x).items())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def trained(build):
    """An expanded model three steps into its training, its optimizer, a batch and its targets."""
    model, x = build(OWN)
    targets = {task: torch.randn_like(out) for task, out in model(x).items()}
    dtme.expand(model, OLD)
    optimizer = torch.optim.Adam(model.parameter_groups(lr=1e-3))
    train(model, optimizer, x, targets)
    return model, optimizer, x, targets


def everything(model, optimizer=None):
    """All that an error must leave as it was: identities and values."""
    groups = [] if optimizer is None else optimizer.param_groups
    state = {} if optimizer is None else optimizer.state
    return {
        "attributes": {n: {k: id(v) for k, v in vars(m).items()} for n, m in model.named_modules()},
        "hooks": {
            n: [(k, list(v.items())) for k, v in vars(m).items() if k.endswith("_hooks") and v]
            for n, m in model.named_modules()
        },
        "parameters": {n: (id(p), p.requires_grad, id(p.grad)) for n, p in model.named_parameters()},
        "values": {n: v.clone() for n, v in model.state_dict().items()},
        "groups": [{k: [id(p) for p in v] if k == "params" else v for k, v in g.items()} for g in groups],
        "lists": [id(group["params"]) for group in groups],
        "state": {id(p): {k: v.clone() for k, v in s.items()} for p, s in state.items()},
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
    }


def is_same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return (a == b).all()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b


def test_what_is_in_both_plans_keeps_parameters_and_optimizer_state(trained):
    model, optimizer, x, targets = trained
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    before, groups = added(model), list(optimizer.param_groups)
    states = {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    assert dtme.replan(model, NEW, optimizer) is model
    now = added(model)
    modulated = [(B, "depth"), *((C, task) for task in TASKS)]
    want = {f"{block}.dtme.{kind}.{task}" for block, task in modulated for kind in ("weight", "bias")}
    want |= {f"{A}.dtme.tokens.semseg", f"{C}.dtme.tokens.semseg"} | {f"{B}.dtme.tokens.{t}" for t in TASKS}
    assert now.keys() == want
    kept = before.keys() & now.keys()
    assert len(kept) == 5 and all(now[name] is before[name] for name in kept)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == len({id(p) for p in held})
    assert optimizer.param_groups[0] is groups[0] and optimizer.param_groups[1] is groups[1] and len(groups) == 2
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in now.values()}
    gone = {id(before[name]) for name in before.keys() - now.keys()}
    assert {id(p): s for p, s in optimizer.state.items()}.keys() == states.keys() - gone
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(state[k], v) for k, v in states[id(parameter)].items())
    for name in now.keys() - before.keys():
        assert (now[name] == (1 if "weight" in name else 0)).all() or "tokens" in name
        assert "tokens" not in name or 0 < now[name].std() < 0.04
    losses = train(model, optimizer, x, targets)
    scheduler.step()
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    assert all(optimizer.state[p]["step"] == 3 + 3 * (name in kept) for name, p in now.items())


@pytest.mark.parametrize("client", [name for name in CLIENTS if "DINOv2" not in name and "qk" not in name])
def test_gated_tokens_and_new_modulations_leave_the_function_as_it_was(build, randomise, client):
    model, x = build(client)
    old, new = plans(model)
    more = {block: TASKS for block in (*old.modulation, *old.expansion)}
    grown = dtme.ExpansionPlan(TASKS, 2, more, more)
    dtme.expand(model, old)
    randomise(model)
    want = model(x)
    dtme.replan(model, grown, gate_tokens=True)
    for task, out in model(x).items():
        torch.testing.assert_close(out, want[task], rtol=1e-11, atol=1e-11)
    gates = {name: p for name, p in added(model).items() if ".gate." in name}
    kept = {(block, task) for block, tasks in old.expansion.items() for task in tasks}
    assert {tuple(n.split(".dtme.gate.")) for n in gates} == {(b, t) for b in more for t in TASKS} - kept
    assert all(p.shape == () and p == 0 for p in gates.values())
    sum(out.square().sum() for out in model(x).values()).backward()
    tokens = {name: model.backbone.get_parameter(name.replace(".gate.", ".tokens.")) for name in gates}
    assert all(p.grad != 0 for p in gates.values()) and all(not p.grad.any() for p in tokens.values())
    with torch.no_grad():
        for parameter in gates.values():
            parameter.fill_(0.7)
    model.zero_grad()
    at_once = model(x)
    sum(out.square().sum() for out in at_once.values()).backward()
    assert all(p.grad.any() for p in tokens.values()) and dtme.verify(model, x) < 1e-11
    for task in TASKS:
        torch.testing.assert_close(model.export_task(task)(x), at_once[task], rtol=1e-11, atol=1e-11)
        assert not torch.allclose(at_once[task], want[task])
    dtme.replan(model, new)  # gates go with their tokens
    left = added(model)
    assert {n for n in left if ".gate." in n} == {n for n in gates if n.replace("gate", "tokens") in left}


def test_a_gate_at_one_is_no_gate(build, randomise):
    model, x = build(OWN)
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {A: TASKS}))
    plan = dtme.ExpansionPlan(TASKS, 2, {A: TASKS}, {B: TASKS, C: ("depth",)})
    dtme.replan(model, plan, gate_tokens=True)
    randomise(model)
    free = copy.deepcopy(model)
    for name, parameter in added(model).items():
        if ".gate." in name:
            nn.init.ones_(parameter)
    dtme.replan(free, dtme.ExpansionPlan(TASKS, 1, plan.modulation))
    dtme.replan(free, plan)
    free.load_state_dict({n: v for n, v in model.state_dict().items() if ".gate." not in n})
    for task, out in model(x).items():
        torch.testing.assert_close(out, free(x)[task], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(model(x, task)[task], out, rtol=1e-11, atol=1e-11)


def test_one_compiled_graph_serves_gated_and_other_tasks(build, randomise):
    model, x = build("timm ViT")
    model.heads = nn.ModuleDict({task: nn.Linear(WIDTH, 2).double() for task in TASKS})
    old, _ = plans(model)
    dtme.expand(model, old)
    some = {block: ("semseg", "depth") for block in old.expansion}
    dtme.replan(model, dtme.ExpansionPlan(TASKS, 2, old.modulation, some), gate_tokens=True)
    randomise(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for task in TASKS:
            torch.testing.assert_close(compiled(x, task)[task], model(x, task)[task], rtol=1e-10, atol=1e-10)
    assert counter.frame_count == 2  # one for the backbone, one for heads of one kind
    torch._dynamo.reset()


def test_saved_gated_models_are_loaded_again(build, randomise, tmp_path):
    model, x = build(OWN)
    dtme.expand(model, OLD)
    dtme.replan(model, NEW, gate_tokens=True)
    randomise(model)
    for only in (False, True):
        model.save_pretrained(tmp_path / str(only), expansion_only=only)
        plain, _ = build(OWN)
        again = dtme.MultiTaskModel.from_pretrained(tmp_path / str(only), plain.backbone, plain.heads).eval()
        assert same_predictions(model(x), again(x)) and list(again.state_dict()) == list(model.state_dict())
    other, _ = build(OWN)
    dtme.replan(dtme.expand(other, OLD), NEW, gate_tokens=True)
    other.load_state_dict(model.state_dict())
    assert same_predictions(model(x), other(x))
    groups = model.parameter_groups()
    gates = [p for n, p in model.named_parameters() if ".gate." in n]
    assert gates and groups[1]["weight_decay"] == 0 and {id(p) for p in gates} <= {id(p) for p in groups[1]["params"]}
    config = tmp_path / "True" / "dtme_config.json"
    config.write_text(config.read_text().replace('"gates": {', '"gates": {"nowhere": ["depth"], '))
    plain, _ = build(OWN)
    with pytest.raises(ValueError, match=r"dtme_config.json was changed, .* its 'gates' is {'nowhere'"):
        dtme.MultiTaskModel.from_pretrained(tmp_path / "True", plain.backbone, plain.heads)
    assert not dtme.is_expanded(plain)
    assert dtme.collapse(model) is model and not added(model)


def test_other_numbers_of_tokens_are_new_ones_and_statistics_stay(build):
    model, x = build(OWN)
    dtme.expand(model, OLD, modulator="batch_norm", freeze_backbone=True, shared_prefix=False)
    model.train()(x)
    before, statistics = added(model), dict(model.named_buffers())
    plan = dtme.ExpansionPlan(TASKS, 3, OLD.modulation, OLD.expansion)
    dtme.replan(model, plan)
    for name, parameter in added(model).items():
        assert (parameter is before[name]) == ("tokens" not in name)
    kept = {name: buffer for name, buffer in model.named_buffers() if "running" in name}
    assert len(kept) == 12 and all(buffer is statistics[name] for name, buffer in kept.items())
    (expansion,) = {adapter.expansion for adapter in dtme.streams.adapters(model)}
    assert (expansion.modulator, expansion.shared_prefix, expansion.plan) == ("batch_norm", False, plan)
    assert not model.backbone.layers[0].mlp[0].weight.requires_grad
    dtme.collapse(model)
    assert all(p.requires_grad for p in model.parameters())


def test_replanning_all_along_a_training(build):
    model, x = build(OWN)
    targets = {task: 0.1 * torch.randn_like(out) for task, out in model(x).items()}
    losses = {task: nn.functional.mse_loss for task in TASKS}
    loader = [(x, targets), (x.flip(0), {task: y.flip(0) for task, y in targets.items()})]
    dtme.expand(model, dtme.analyze(model, loader, losses, progress=False).plan(num_tokens=2))
    optimizer = torch.optim.Adam(model.parameter_groups(lr=3e-3))
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, 40, power=0.9)
    seen = []
    for step in range(40):
        if step in (10, 20, 30):
            report = dtme.analyze(model, loader, losses, progress=False)
            dtme.replan(model, report.plan(num_tokens=2, strategy="random", seed=step), optimizer, gate_tokens=True)
        seen += train(model, optimizer, x, targets, 1)
        scheduler.step()
    assert all(seen[i + 9] < seen[i] for i in (0, 10, 20, 30)) and seen[-1] < 0.5 * seen[0]
    assert dtme.verify(model, x) < 1e-10


WIDE = dtme.ExpansionPlan(TASKS, 2, {A: TASKS}, {}, {A: 99})
WRONG = {
    "a missing block": (dtme.ExpansionPlan(TASKS, 2, {"layers.7": TASKS}), "'layers.7'"),
    "another width": (WIDE, "99 channels at block 'layers.0'"),
    "an unknown task": (dtme.ExpansionPlan((*TASKS, "pose"), 2, {A: TASKS}), "unknown task 'pose'"),
    "no block": (dtme.ExpansionPlan(TASKS, 2, {"layers.0.norm1": TASKS}), "'layers.0.norm1'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_plan_for_another_model_changes_nothing(trained, wrong):
    model, optimizer, *_ = trained
    plan, message = WRONG[wrong]
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        dtme.replan(model, plan, optimizer, gate_tokens=True)
    assert is_same(before, everything(model, optimizer))


def refuse(name, *_):
    raise ValueError(f"{name} cannot take task tokens")


class Lost(torch.optim.Adam):
    """A Ctrl-C in the last step."""

    def add_param_group(self, group):
        if self.param_groups:
            raise KeyboardInterrupt
        super().add_param_group(group)


@pytest.mark.parametrize("client", [OWN, "transformers ViT", "timm ViT"])
@pytest.mark.parametrize("how", ["attention", "optimizer"])
def test_an_error_half_way_leaves_everything_as_it_was(build, randomise, client, how, monkeypatch):
    model, x = build(client)
    old, new = plans(model)
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2) if how == "optimizer" else old)
    randomise(model)
    first = next(iter(find_blocks(model.backbone).values()))
    first.register_forward_hook(lambda *_: None)
    if how == "attention":
        monkeypatch.setattr("dtme.expansion.find_attention", refuse)
    optimizer, want = Lost(model.parameters(), lr=1e-3, weight_decay=0.1), model(x)
    before = everything(model, optimizer)
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt if how == "optimizer" else ValueError):
        warnings.simplefilter("ignore")  # of the new group
        dtme.replan(model, new, optimizer)
    assert is_same(before, everything(model, optimizer))
    assert same_predictions(model(x), want)
    dtme.collapse(model)
    assert not added(model)


def test_models_and_optimizers_that_do_not_fit_are_refused(trained, build):
    model, optimizer, *_ = trained
    base = [p for name, p in model.named_parameters() if ".dtme." not in name]
    refused = (
        ((model, {"modulation": {}}), TypeError, "ExpansionPlan, got dict"),
        ((None, NEW), TypeError, "the model must be a torch.nn.Module, got NoneType"),
        ((model, NEW, "adam"), TypeError, "Optimizer, got str"),
        ((model, NEW, torch.optim.SGD(nn.Linear(2, 2).parameters())), ValueError, "holds none of the model's"),
        ((model, NEW, torch.optim.SGD(base)), ValueError, "does not hold 'backbone.layers.0.dtme.weight.semseg'"),
        ((model, NEW, torch.optim.LBFGS(model.parameters())), ValueError, "LBFGS"),
        ((build(OWN)[0], NEW), RuntimeError, "not expanded"),
        ((nn.DataParallel(model), NEW), RuntimeError, "wrapped by DataParallel"),
        ((torch.compile(model), NEW), RuntimeError, r"wrapped by torch\.compile"),
        ((model.backbone.layers, NEW), RuntimeError, "a part of what was expanded"),
    )
    before = everything(model, optimizer)
    for arguments, error, message in refused:
        with pytest.raises(error, match=message):
            dtme.replan(*arguments)
    assert is_same(before, everything(model, optimizer))
    towers = nn.ModuleList([OwnTransformer(), OwnTransformer()])
    for tower in towers:
        dtme.expand(tower, OLD)
    with pytest.raises(RuntimeError, match="2 backbones"):
        dtme.replan(towers, NEW)
    model.backbone.layers[1] = nn.Sequential(model.backbone.layers[1])
    with pytest.raises(RuntimeError, match=r"block 'layers\.1'"):
        dtme.replan(model, NEW)


def test_random_numbers_are_drawn_for_new_tokens_only(trained):
    model, optimizer, *_ = trained
    before = everything(model, optimizer)["random"]
    more = dtme.ExpansionPlan(TASKS, 2, {A: TASKS, B: TASKS, C: TASKS}, OLD.expansion)
    for plan in (OLD, more):
        dtme.replan(model, plan, optimizer)
        assert is_same(before, everything(model)["random"])
    dtme.replan(model, dtme.ExpansionPlan(TASKS, 2, {}, {B: TASKS, C: TASKS}), optimizer)
    torch.set_rng_state(before[0])
    drawn = 0.02 * torch.randn(2, WIDTH, dtype=torch.float64)
    assert torch.equal(added(model)[f"{B}.dtme.tokens.semseg"], drawn)


def test_a_bare_backbone_and_a_copy(build):
    model, x = build(OWN)
    backbone = dtme.expand(model.backbone, OLD)
    twin = copy.deepcopy(backbone)
    assert dtme.replan(backbone, NEW, gate_tokens=True) is backbone
    assert set(added(twin)) != set(added(backbone)) and backbone.layers[0].dtme.gate["semseg"] == 0
    again = copy.deepcopy(backbone)
    with dtme.tasks(backbone, "semseg"), dtme.tasks(again, "semseg"):
        assert torch.equal(again(x), backbone(x)) and x.shape[-1] == WIDTH


def test_groups_keep_what_is_theirs_by_name(build, randomise):
    model, x = build(OWN)
    groups = {"dense": ("semseg", "depth")}
    grouped = dtme.ExpansionPlan(TASKS, 2, {A: TASKS, B: TASKS}, {B: TASKS}, groups=groups)
    dtme.expand(model, OLD)
    randomise(model)
    optimizer = torch.optim.Adam(model.parameter_groups(lr=1e-3))
    before = added(model)
    dtme.replan(model, grouped, optimizer, gate_tokens=True)
    now = added(model)
    kept = {f"{block}.dtme.{kind}.normals" for block in (A, B) for kind in ("weight", "bias")}
    assert before.keys() & now.keys() == kept | {f"{B}.dtme.tokens.normals"}
    assert all(now[name] is before[name] for name in before.keys() & now.keys())
    assert {name for name in now if ".gate." in name} == {f"{B}.dtme.gate.dense"}
    randomise(model)
    assert dtme.verify(model, x) < 1e-10
    for task, out in model(x).items():
        torch.testing.assert_close(model.export_task(task)(x), out, rtol=1e-10, atol=1e-10)
    more = dtme.ExpansionPlan(TASKS, 2, {A: TASKS, C: TASKS}, {B: TASKS}, groups={"dense": TASKS})
    dtme.replan(model, more, optimizer)
    assert all(p is now[name] for name, p in added(model).items() if name in now and ".dense" in name)
    assert {id(p) for p in added(model).values()} == {id(p) for p in optimizer.param_groups[1]["params"]}
    dtme.replan(model, OLD, optimizer)
    assert added(model).keys() == before.keys() and dtme.verify(model, x) < 1e-10
