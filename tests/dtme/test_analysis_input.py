"""An analysis of bad input names the culprit, and leaves the model as it was; so does one that is interrupted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dtme
from tests.dtme.clients import TASKS, OwnBlock
from tests.dtme.snapshots import Dropping, same, snapshot

LOSSES = {task: F.mse_loss for task in TASKS}


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("failure", [None, KeyboardInterrupt, ZeroDivisionError])
def test_the_model_is_left_exactly_as_it_was(problem, train_mode, failure):
    model, loader = problem()
    model.heads["semseg"] = Dropping().double()
    model.backbone.layers[1].eval()
    model.heads["depth"].weight.requires_grad_(False)
    model.train()
    model.backbone.layers[1].eval()
    model.heads["semseg"].out.weight.grad = torch.ones_like(model.heads["semseg"].out.weight)
    calls = []

    def loss(prediction, target):
        if torch.is_grad_enabled():  # else it is taken with the labels of other images
            calls.append(torch.rand(1))
        if failure and len(calls) == 2:
            raise failure
        return F.mse_loss(prediction, target)

    before = snapshot(model)
    shuffled = DataLoader(
        [(x[0], {t: y[0] for t, y in targets.items()}) for x, targets in loader], batch_size=2, shuffle=True
    )

    def run():
        dtme.analyze(model, shuffled, {**LOSSES, "semseg": loss}, train_mode=train_mode, progress=False)

    if failure:
        with pytest.raises(failure):
            run()
    else:
        run()
    same(before, snapshot(model))


def bad(problem, **change):
    model, loader = problem()
    arguments = {"model": model, "loader": loader, "losses": LOSSES, "progress": False}
    arguments |= {
        key: value(model, loader) if callable(value) and key != "losses" else value for key, value in change.items()
    }
    return arguments


def with_value(value):
    def change(model, loader):
        loader = copy.deepcopy(loader)
        loader[1][0][0, 0, 0] = value
        return loader

    return change


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"loader": lambda m, batches: iter(batches)}, ValueError, "once only"),
        ({"loader": lambda m, batches: (batch for batch in batches)}, ValueError, "once only"),
        ({"loader": []}, ValueError, "no batch"),
        ({"loader": 3}, TypeError, "loader must be iterable"),
        (
            {"loader": lambda m, batches: [batch[0] for batch in batches]},
            ValueError,
            r"must yield \(x, {task: target}\)",
        ),
        (
            {"loader": lambda m, b: [(x, {"depth": y["depth"]}) for x, y in b]},
            ValueError,
            "no target for task 'semseg'",
        ),
        ({"loader": with_value(float("nan"))}, ValueError, r"tokens of 'layers.0'.* NaN or Inf"),
        ({"loader": with_value(float("inf"))}, ValueError, r"tokens of 'layers.0'.* NaN or Inf"),
        ({"losses": {**LOSSES, "pose": F.mse_loss}}, ValueError, "unknown task 'pose'"),
        ({"losses": {"depth": F.mse_loss}}, ValueError, "at least two tasks"),
        ({"losses": 3}, TypeError, "losses must be"),
        ({"losses": {**LOSSES, "depth": lambda p, y: p}}, ValueError, "loss of task 'depth' must be a scalar"),
        (
            {"losses": {**LOSSES, "depth": lambda p, y: p.sum().item()}},
            ValueError,
            "'depth' must be a scalar tensor, got float",
        ),
        (
            {"losses": {**LOSSES, "depth": lambda p, y: p.sum() * float("nan")}},
            ValueError,
            "loss of task 'depth' is not finite",
        ),
        ({"losses": {**LOSSES, "depth": lambda p, y: p.sum().detach()}}, ValueError, "'depth' is not connected"),
        (
            {"losses": {**LOSSES, "depth": lambda p, y: p.sum() * 0}},
            ValueError,
            "task 'depth' has no gradient anywhere",
        ),
        (
            {"losses": {**LOSSES, "depth": lambda p, y: (p * 0).sqrt().sum()}},
            ValueError,
            r"task 'depth' at block .* NaN or Inf",
        ),
        ({"ratio": 0.0}, ValueError, "ratio"),
        ({"ratio": "x"}, ValueError, "ratio"),
        ({"blocks": 3}, TypeError, "blocks must be"),
        ({"blocks": ["layers.1", "layers.1"]}, ValueError, "different blocks"),
        ({"losses": {**LOSSES, "depth": 3}}, TypeError, r"losses\['depth'\] must be a function"),
        ({"max_batches": 0}, ValueError, "max_batches"),
        ({"blocks": "encoder.layers"}, ValueError, "blocks='encoder.layers' is not a module"),
        ({"blocks": ["layers.7"]}, ValueError, "'layers.7'"),
        ({"model": lambda m, b: m.backbone}, TypeError, "need a MultiTaskModel"),
    ],
)
def test_bad_input_names_the_culprit_and_leaves_the_model(problem, change, error, says):
    arguments = bad(problem, **change)
    before = snapshot(arguments["model"])
    with pytest.raises(error, match=says):
        dtme.analyze(**arguments)
    same(before, snapshot(arguments["model"]))


def test_a_train_method_that_changes_weights_is_not_called(problem):
    """Low-rank adapters of some libraries merge their weights in it."""
    model, loader = problem()

    class Merging(nn.Linear):
        def train(self, mode=True):
            if not mode:
                self.weight.data += 1
            return super().train(mode)

    model.heads["depth"] = Merging(24, model.heads["depth"].out_features).double()
    before = snapshot(model)
    dtme.analyze(model, loader, LOSSES, progress=False)
    same(before, snapshot(model))


def test_unknown_transformers(problem):
    model, loader = problem()
    with pytest.raises(ValueError, match=r"recognised in Linear.*blocks='encoder\.layers'"):
        dtme.analyze(dtme.MultiTaskModel(nn.Linear(24, 24), dict(model.heads)), loader, LOSSES, progress=False)


# --- blocks that cannot be read ---------------------------------------------------------------------------------------


class Changed(nn.Module):
    """A block that goes about its tokens in another way."""

    def __init__(self, block, forward):
        super().__init__()
        self.attn, self.mlp, self.change = block.attn, block.mlp, forward

    def forward(self, x):
        return self.change(self, x)


class Around(nn.Module):
    """Calls a block in another way."""

    def __init__(self, block, call):
        super().__init__()
        self.block, self.call = block, call

    def forward(self, x):
        return self.call(self.block, x)


def overwrite(block, x):
    x += block.attn(x)
    return x + block.mlp(x)


UNREADABLE = {
    "did not run": (lambda block: Around(block, lambda block, x: x), "did not run in a forward"),
    "ran twice": (lambda block: Around(block, lambda block, x: block(block(x))), "runs more than once in a forward"),
    "in place": (lambda block: Changed(block, overwrite), "or one before it changes its tokens in place"),
    "no tokens": (
        lambda block: Around(Changed(block, lambda block, x: block.attn(x[0])), lambda block, x: block([x])),
        "was called without tokens",
    ),
    "sequence first": (
        lambda block: Changed(OwnBlock(nn.MultiheadAttention(24, 3)), None),
        "takes its tokens sequence first",
    ),
    "not finite": (lambda block: Around(block, lambda block, x: block(x / 0)), "hold NaN or Inf"),
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("case", UNREADABLE)
def test_a_block_that_was_only_found_is_told_apart_from_one_that_was_named(problem, case, named):
    """Who did not name the blocks learns how to; who did is told no more than what is wrong."""
    change, says = UNREADABLE[case]
    model, loader = problem()
    model.backbone.layers[1] = change(model.backbone.layers[1]).double()
    name = "layers.1.block" if hasattr(model.backbone.layers[1], "block") else "layers.1"
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"'{name}'.*{says}") as error:
        dtme.analyze(model, loader, LOSSES, blocks=[name] if named else None, progress=False)
    assert ("dtme.analyze(..., blocks='encoder.layers')" in str(error.value)) is not named
    same(before, snapshot(model))
