"""What is known of sharing: how it is found out, when it is no longer known, and what happens where it is not right."""

import copy
import warnings

import pytest
import torch
from torch import nn

import dtme
from tests.dtme.backbones import (
    LENGTH,
    Guiding,
    Maps,
    Wrapper,
    equals_each_alone,
    expanded,
)
from tests.dtme.clients import TASKS, WIDTH, OwnTransformer


def test_the_three_ways_give_the_same_and_say_which_they_are():
    x = torch.randn(4, LENGTH, WIDTH).double()
    predictions = []
    for shared_prefix in ("auto", True, False):
        _, model, _ = expanded(OwnTransformer, shared_prefix=shared_prefix)
        rows = []
        handle = model.backbone.layers[0].mlp.register_forward_pre_hook(lambda m, a, rows=rows: rows.append(len(a[0])))
        model(x)
        rows.clear()
        predictions.append(model(x))
        assert rows == ([4, 4, 4] if shared_prefix is False else [8])  # depth alone, the others together
        handle.remove()
    for other in predictions[1:]:
        for task in TASKS:
            torch.testing.assert_close(other[task], predictions[0][task], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="shared_prefix must be one of"):
        expanded(OwnTransformer, shared_prefix="yes")


def test_what_cannot_share_says_so_once_and_raises_where_it_must():
    x = torch.randn(4, LENGTH, WIDTH).double()
    _, model, _ = expanded(Maps)
    with pytest.warns(UserWarning, match=r"block 'encoder.layers.0'.* runs once for every task .*\(4, 24, 15\)"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        model(x)
    _, model, _ = expanded(Maps, shared_prefix=True)
    with pytest.raises(RuntimeError, match="cannot share its first blocks among tasks as shared_prefix=True asks"):
        model(x)


def test_a_call_of_another_kind_is_compared_anew():
    """The same backbone with other options returns other things, from other blocks."""
    _, model, _ = expanded(OwnTransformer)
    net = model.backbone

    class Taps(nn.Module):
        def forward(self, states):
            return states

    def taps(net, x):
        found, y = [], x["x"]
        for block in net.layers[: x["stop"]]:
            y = block(y)
            found.append(y)
        return found

    tapped = dtme.MultiTaskModel(net, {task: Taps() for task in TASKS}, features=taps)
    x = torch.randn(3, LENGTH, WIDTH).double()
    for stop in (1, 3, 2, 0, 3):
        at_once = tapped({"x": x, "stop": stop})
        for task in TASKS:
            alone = tapped({"x": x, "stop": stop}, task)[task]
            assert len(alone) == stop and [t.shape for t in alone] == [t.shape for t in at_once[task]]
            for a, b in zip(at_once[task], alone, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_function_whose_result_changes_behind_the_scenes_is_compared_anew():
    """What it taps depends on something that no argument shows: all tasks shared it at first, then no more."""
    _, model, _ = expanded(OwnTransformer)
    where = [0]

    def tap(net, x):
        for block in net.layers[: where[0] + 1]:
            x = block(x)
        return x

    def taps(net, x):
        found = []
        for block in net.layers:
            found.append(x)
            x = block(x)
        return [*found, x][where[0]]

    x = torch.randn(3, LENGTH, WIDTH).double()
    for features, indices in ((tap, (0, 2, 1, 0)), (taps, (0, 2, 1, 0, 3))):
        model.features = features
        for where[0] in indices:
            at_once = model(x)
            for task in TASKS:
                torch.testing.assert_close(at_once[task], model(x, task)[task], rtol=1e-10, atol=1e-10)


def test_calls_that_never_repeat_are_not_compared_forever():
    _, model, _ = expanded(OwnTransformer)
    counted = dtme.MultiTaskModel(model.backbone, dict(model.heads), features=lambda net, x: net(x["x"]) + x["step"])
    x = torch.randn(3, LENGTH, WIDTH).double()
    for step in range(64):
        counted({"x": x, "step": step})
    with pytest.warns(UserWarning, match="more than 64 kinds of calls"):
        at_once = counted({"x": x, "step": 64})
    torch.testing.assert_close(at_once["depth"], model(x, "depth")["depth"] + 64, rtol=1e-10, atol=1e-10)


class Standardising(nn.Module):
    """Statistics of the batch behind the blocks, in training."""

    def __init__(self):
        super().__init__()
        self.encoder, self.norm = OwnTransformer(), nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        y = self.encoder(x)
        return self.norm(y.flatten(0, 1)).view_as(y)


class Branching(nn.Module):
    """Goes another way by a number, by its mode, or for large batches."""

    def __init__(self):
        super().__init__()
        self.encoder, self.level, self.most = OwnTransformer(), 0.0, 100

    def forward(self, x, level=0.0):
        y = self.encoder(x)
        mixes = level + self.level > 1 or len(x) > self.most or (self.training and self.most < 100)
        return y - y.mean(0) if mixes else y


def test_training_is_compared_as_training():
    _, model, _ = expanded(Standardising)
    x = torch.randn(4, LENGTH, WIDTH).double()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    model(x)
    assert dtme.sharing_of(model) == "shared prefix"
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    model.train()
    other = copy.deepcopy(model)
    model(x)
    assert model.backbone.norm.num_batches_tracked == 3  # one for each task, and none for the comparison
    for task in TASKS:
        other(x, task)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))
    equals_each_alone(model, x)
    assert "BatchNorm1d layers would take statistics" in dtme.sharing_of(model)
    _, model, _ = expanded(Branching)
    model.backbone.most = 99
    equals_each_alone(model, x)
    equals_each_alone(model.train(), x)


def test_what_was_known_is_forgotten_with_the_modules_the_numbers_and_the_sizes_it_was_known_of():
    x = torch.randn(4, LENGTH, WIDTH).double()
    _, model, _ = expanded(lambda: Wrapper(OwnTransformer()))
    equals_each_alone(model, x)
    model.backbone.inner.layers[2].mlp[1] = Centring()  # a part of it
    equals_each_alone(model, x)
    _, model, _ = expanded(Branching)
    model.features = lambda net, x: net(x[0], level=x[1])
    for level in (0.0, 2.0, 0.5):
        equals_each_alone(model, (x, level))
    _, model, _ = expanded(Branching)
    model.backbone.most = 5
    for rows in (4, 6, 2, 8):
        equals_each_alone(model, torch.randn(rows, LENGTH, WIDTH).double())


class Centring(nn.Module):
    """Mixes rows."""

    def forward(self, x):
        return x - x.mean(0)


def test_a_mask_for_all_images_that_becomes_one_for_each():
    _, model, _ = expanded(lambda: Guiding(lambda s: {"bias": s[0].new_zeros(1, 1, 1, LENGTH)}))
    net = model.backbone
    for rows in (4, 3, 2, 6):
        x = torch.randn(rows, LENGTH, WIDTH).double()
        for shared in (True, False):
            bias = torch.randn(1 if shared else rows, 1, 1, LENGTH).double()
            net.make = lambda s, bias=bias: {"bias": bias}
            equals_each_alone(model, x)


def test_numbers_and_objects_among_what_is_returned():
    """A number that is read off all tasks' rows is not each task's; what cannot be taken apart is refused by name."""
    _, model, _ = expanded(OwnTransformer)
    model.features = lambda net, x: (y := net(x), y.square().mean().item())[0] * y.square().mean().item()
    equals_each_alone(model, torch.randn(4, LENGTH, WIDTH).double())

    class Returning(OwnTransformer):
        def forward(self, x):
            y = super().forward(x)
            return {"y": y, "extra": self.make(y)}

    x = torch.randn(4, LENGTH, WIDTH).double()
    for make, says in (
        (lambda y: y.sum().item(), "a float"),
        (lambda y: y.sum(), "a tensor without rows"),
        (lambda y: Wrapper(None), "a Wrapper"),
    ):
        _, model, _ = expanded(Returning)
        model.backbone.make = make
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match=f"returns {says}.* choose one task"):
            warnings.simplefilter("ignore")
            model.backbone(x)


@pytest.mark.parametrize("shared_prefix", ["auto", False])
def test_inputs_are_fresh_for_every_task(shared_prefix):
    _, model, _ = expanded(OwnTransformer, shared_prefix=shared_prefix)

    def features(net, x):
        x["x"] = x["x"] * 2
        x["list"].append(1)
        return net(x["x"]) * len(x["list"])

    model.features = features
    x = torch.randn(3, LENGTH, WIDTH).double()
    at_once = model({"x": x, "list": []})
    for task in TASKS:
        alone = model({"x": x, "list": []}, task)[task]
        torch.testing.assert_close(at_once[task], alone, rtol=1e-10, atol=1e-10)


def test_a_batch_of_equal_images_teaches_nothing():
    """Rows that were mixed up could not be told apart: such a batch runs one by one, and the next is compared."""
    _, model, _ = expanded(OwnTransformer)
    x = torch.randn(1, LENGTH, WIDTH).double().expand(4, -1, -1)
    model(x)
    assert dtme.sharing_of(model) == "one by one"
    model(torch.randn(4, LENGTH, WIDTH).double())
    assert dtme.sharing_of(model) == "shared prefix"


def test_the_comparison_leaves_no_trace():
    _, model, _ = expanded(OwnTransformer)
    model.train()
    model.backbone.layers[1].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    out = model(torch.ones(3, LENGTH, WIDTH).double().cumsum(0))
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and all(p.requires_grad for p in out.values())


def test_an_input_changed_in_place_is_refused():
    class InPlace(OwnTransformer):
        def forward(self, x):
            return super().forward(x.sub_(x.mean()))

    _, model, _ = expanded(InPlace)
    with pytest.raises(RuntimeError, match="changes its input in place"):
        model(torch.randn(3, LENGTH, WIDTH).double())
