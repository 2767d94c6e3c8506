"""A plan in a checkpoint that another library writes."""

import copy
import io
import json

import pytest
import torch
from torch import nn

import dtme
from tests.dtme.clients import CLIENTS, TASKS, WIDTH, OwnTransformer, mixed_plan, same_predictions


def plain(seed=9):
    torch.manual_seed(seed)
    return dtme.MultiTaskModel(CLIENTS["own, generic seam"](), {task: nn.Linear(WIDTH, 2) for task in TASKS}).eval()


def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def expanded(**options):
    model = plain(1)
    dtme.expand(model, mixed_plan(model), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def gated():
    model = expanded()
    blocks = list(mixed_plan(model).modulation)
    dtme.replan(model, dtme.ExpansionPlan(TASKS, 3, {}, {blocks[0]: ("depth",)}), gate_tokens=True)
    return model


def grouped():
    model = plain(1)
    plan = dtme.ExpansionPlan(TASKS, 2, {"layers.1": TASKS}, groups={"geometry": ("depth", "normals")})
    return dtme.expand(model, plan)


@pytest.mark.parametrize(
    "make",
    [
        expanded,
        lambda: expanded(modulator="batch_norm", freeze_backbone=True, shared_prefix=False),
        gated,
        grouped,
        lambda: plain(1),
    ],
    ids=["affine", "batch norm, frozen", "gates", "groups", "not expanded"],
)
def test_a_plain_model_becomes_the_saved_one(make):
    model, x = make().eval(), torch.randn(3, 5, WIDTH)
    checkpoint = through_a_file({"model": model.state_dict(), "expansion": dtme.expansion_state(model)})
    assert checkpoint["expansion"] == json.loads(json.dumps(dtme.expansion_state(model)))
    again = plain()
    random = torch.get_rng_state()
    assert dtme.load_expansion_state(again, checkpoint["expansion"]) is again
    assert torch.equal(random, torch.get_rng_state())  # a run that goes on draws what it would have drawn
    again.load_state_dict(checkpoint["model"])
    assert same_predictions(again(x), model(x)) and dtme.expansion_state(again) == dtme.expansion_state(model)
    frozen = [[p.requires_grad for p in one.parameters()] for one in (again, model)]
    assert frozen[0] == frozen[1]
    dtme.load_expansion_state(again, checkpoint["expansion"])  # of a run that goes on, nothing happens
    assert same_predictions(again(x), model(x))


def test_a_bare_backbone_too():
    model = expanded()
    again = plain()
    dtme.load_expansion_state(again.backbone, dtme.expansion_state(model.backbone))
    assert again.state_dict().keys() == model.state_dict().keys()


def test_another_expansion_is_refused_and_nothing_changes():
    model = expanded()
    state, before = dtme.expansion_state(model), copy.deepcopy(model.state_dict())
    for other, says in ((grouped(), "modulation"), (plain(), "modulation")):
        with pytest.raises(RuntimeError, match=f"expanded in another way.*{says}"):
            dtme.load_expansion_state(model, dtme.expansion_state(other))
    assert model.state_dict().keys() == before.keys() and dtme.expansion_state(model) == state


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"plan": dtme.ExpansionPlan(["a"]).as_dict() | {"layers": {}}}, "plan: has the unknown field 'layers'"),
        ({"plan": dtme.ExpansionPlan(["a"]).as_dict()}, "unknown task 'a'"),
        ({"plan": {"tasks": ["a"]}}, "plan: lacks the field 'expansion'"),
        ({"plan": None}, "plan must be a mapping"),
        ({"freeze_backbone": "no"}, "freeze_backbone must be true or false"),
        ({"gates": None}, "gates must be a mapping"),
        ({"gates": {"layers.0": ["depth"]}}, "gates of block 'layers.0'"),
        ({"modulator": "spline"}, "modulator must be one of"),
        ({"more": 1}, "must be what dtme.expansion_state"),
    ],
)
def test_a_damaged_state_is_refused_and_the_model_is_as_it_was(change, says):
    state, model = dtme.expansion_state(expanded()) | change, plain()
    with pytest.raises(ValueError, match=says):
        dtme.load_expansion_state(model, state)
    assert not dtme.is_expanded(model) and list(model.state_dict()) == list(plain().state_dict())


def test_parts_that_were_expanded_by_themselves_have_no_state():
    model = expanded()
    wrapped = nn.Sequential(model.backbone)
    with pytest.raises(RuntimeError, match="was wrapped, or built of parts"):
        dtme.expansion_state(wrapped)


def test_a_backbone_that_was_frozen_before_stays_so():
    plan = dtme.ExpansionPlan(TASKS, 2, {"layers.0": TASKS})
    backbone = OwnTransformer().requires_grad_(False)
    dtme.expand(backbone, plan, freeze_backbone=True)
    fresh = dtme.load_expansion_state(OwnTransformer(), dtme.expansion_state(backbone))
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == {
        name for name, _ in fresh.named_parameters() if ".dtme." in name
    }
    assert not any(p.requires_grad for p in dtme.collapse(backbone).parameters())
