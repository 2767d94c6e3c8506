"""What ``dtme.compare`` refuses, each with one clear error and nothing written."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dtme
from tests.dtme.comparing import LOSSES, METRICS, TRAIN, VAL, WIDTH, Backbone, compared, loaders, make_model

ONE = dtme.MultiTaskModel(Backbone(2), {"sum": nn.Linear(WIDTH, 1), "sign": nn.Linear(WIDTH, 1)})
SHARED = Backbone(2)
X, Y = torch.zeros(2, 4, WIDTH), torch.zeros(2, 4, 1)


def expanded(seed):
    tasks = ("sum", "sign")
    return dtme.expand(make_model(seed), dtme.ExpansionPlan(tasks, 1, {"layers.0": tasks}))


def with_shared(seed):
    return dtme.MultiTaskModel(SHARED, {task: nn.Linear(WIDTH, 1) for task in LOSSES})


def unseeded(seed):
    model = make_model(seed)
    nn.init.normal_(model.heads["sum"].weight, generator=unseeded.generator)
    return model


unseeded.generator = torch.Generator()


def not_finite(prediction, target):
    return prediction.sum() / 0.0


CASES = {
    "no function": ({"make_model": 3}, "make_model must be a function"),
    "no model": ({"make_model": lambda seed: nn.Linear(2, 2)}, "make_model must return a MultiTaskModel, got Linear"),
    "the same model": ({"make_model": lambda seed: ONE}, "anew in each call, but 'backbone.layers.0.norm1.weight'"),
    "one backbone": ({"make_model": with_shared}, "anew in each call, but 'backbone.layers.0.norm1.weight'"),
    "no seed": ({"make_model": unseeded}, "same model of the same seed, but 'heads.sum.weight' differs"),
    "expanded": ({"make_model": expanded}, "not expanded"),
    "one task": ({"losses": {"sum": F.mse_loss}, "metrics": {"sum": METRICS["sum"]}}, "at least two tasks"),
    "loss": ({"losses": {**LOSSES, "sum": 3}}, re.escape("losses['sum'] must be a function")),
    "tasks of losses": (
        {
            "losses": {"sum": F.mse_loss, "other": F.mse_loss},
            "metrics": {"sum": METRICS["sum"], "other": METRICS["sum"]},
        },
        "losses must be of the model's tasks",
    ),
    "tasks of metrics": ({"metrics": {"sum": METRICS["sum"]}}, "losses and metrics must be of the same tasks"),
    "no direction": ({"metrics": {**METRICS, "sum": F.mse_loss}}, re.escape("metrics['sum'] must be a pair")),
    "direction": ({"metrics": {**METRICS, "sum": (F.mse_loss, "up")}}, "must be 'higher' or 'lower', got 'up'"),
    "ambiguous metric": (
        {"metrics": {**METRICS, "sum": (lambda a=0, b=0: 1.0, "lower")}},
        re.escape("metrics['sum'] takes both no arguments and two"),
    ),
    "no metric": ({"metrics": {**METRICS, "sum": (lambda a: 1.0, "lower")}}, "neither no arguments nor two"),
    "no number": (
        {"metrics": {**METRICS, "sum": (lambda a, b: a, "lower")}},
        re.escape("metrics['sum'] must give one number, got a Tensor of shape"),
    ),
    "no meter": ({"metrics": {**METRICS, "sum": (dict, "lower")}}, "must return a meter with update and compute"),
    "partial": (
        {"metrics": {**METRICS, "sum": (functools.partial(dict, a=1), "lower")}},
        "must return a meter with update and compute",
    ),
    "no validation": ({"loaders": {"train": TRAIN}}, re.escape("loaders must have the key 'val'; it has ['train']")),
    "unknown loader": ({"loaders": {**loaders(), "test": VAL}}, "unknown key 'test'"),
    "iterator": ({"loaders": {**loaders(), "val": iter(VAL)}}, re.escape("loaders['val'] must be a DataLoader")),
    "empty": ({"loaders": {**loaders(), "train": []}}, re.escape("loaders['train'] yields no batches")),
    "no pairs": ({"loaders": {**loaders(), "train": [X]}}, re.escape("loaders['train'] must yield pairs")),
    "other targets": (
        {"loaders": {**loaders(), "val": [(X, {"depth": Y})]}},
        re.escape("yields targets of ['depth'], none of"),
    ),
    "a task without targets": ({"loaders": {**loaders(), "train": [(X, {"sum": Y})] * 2}}, "no target of task 'sign'"),
    "nothing to choose by": ({"lr": (1e-3, 1e-2)}, "must have the key 'tune', with held-out items"),
    "lr": ({"lr": 0.0}, "lr must be a positive number"),
    "equal rates": ({"lr": (1e-3, 1e-3)}, "several different ones"),
    "arms": ({"arms": "joint"}, "arms must be a sequence"),
    "unknown arm": ({"arms": ("joint", "best")}, "unknown arm 'best': known are joint, longer"),
    "no joint": ({"arms": ("conflict",)}, "arms must hold 'joint'"),
    "twice": ({"arms": ("joint", "lora", "lora")}, "'lora' twice"),
    "random twice": ({"arms": ("joint", "random", "random-1")}, "the same plan"),
    "taken": ({"arms": ("joint", {"lora": lambda m, r, s: m})}, "'lora' is known already"),
    "name": ({"arms": ("joint", {"a/b": lambda m, r, s: m})}, "an arm's name must be"),
    "no arm": ({"arms": ("joint", {"mine": 3})}, re.escape("arms['mine'] must be an ExpansionPlan")),
    "makes nothing": ({"arms": ("joint", {"mine": lambda m, r, s: None})}, "arm 'mine' cannot be built: its function"),
    "other tasks": (
        {"arms": ("joint", {"mine": dtme.ExpansionPlan(("a",), 1, {"layers.0": ("a",)})})},
        "arm 'mine' cannot be built",
    ),
    "seeds": ({"seeds": 0}, "seeds must be .* at least 1, got 0"),
    "equal seeds": ({"seeds": (1, 1)}, "different integers"),
    "budget": ({"budget": 1}, "budget must be an integer of at least 2"),
    "share": ({"share": 1.0}, "share must be"),
    "nothing added": ({"modulation": 0.0, "expansion": 0}, "both 0"),
    "modulation": ({"modulation": 2}, "modulation must be a share"),
    "num_tokens": ({"num_tokens": 0}, "num_tokens must be"),
    "read": ({"read": 0}, "read must be None or an integer"),
    "margin": ({"margin": 0}, "margin must be a positive number"),
    "weight_decay": ({"weight_decay": -1}, "weight_decay must be"),
    "diverges at once": ({"losses": {**LOSSES, "sum": not_finite}}, "loss of .*'sum'.* inf"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(case, tmp_path):
    options, said = CASES[case]
    folder = tmp_path / "kept"
    with pytest.raises((TypeError, ValueError), match=said):
        compared(**{"arms": ("joint", "random"), "seeds": 1, "folder": folder, **options})
    assert not folder.exists()


def test_a_backbone_with_a_batch_norm_has_no_adapters_by_name(tmp_path):
    def normed(seed):
        backbone = Backbone(2)
        backbone.layers[0].norm1.inner = nn.BatchNorm1d(3)
        return dtme.MultiTaskModel(backbone, {task: nn.Linear(WIDTH, 1) for task in LOSSES})

    with pytest.raises(ValueError, match=r"arm 'bitfit' cannot be built: the backbone's 'layers.0.norm1.inner' is a"):
        compared(make_model=normed, arms=("joint", "bitfit"), seeds=1, folder=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_predictions_that_cannot_be_joined_need_a_meter():
    x = torch.randn(2, 4, WIDTH)
    uneven = [(x, {"sum": x[..., :1], "sign": x[..., :1]}), (x[:, :3], {"sum": x[:, :3, :1], "sign": x[:, :3, :1]})]
    with pytest.raises(ValueError, match=r"metrics\['sum'\] is a function, but the batches cannot be concatenated"):
        compared(arms=("joint",), seeds=1, loaders={"train": DataLoader(TRAIN, 8), "val": uneven})
