"""All tasks at once are each task alone, whatever a backbone does with its rows."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import dtme
from tests.dtme.backbones import (
    BACKBONES,
    HEADS,
    LENGTH,
    Wrapper,
    equals_each_alone,
    expanded,
    worst,
)
from tests.dtme.clients import SDPA, TASKS, WIDTH, OwnBlock, OwnTransformer, Two, concatenated


@pytest.mark.parametrize("name", BACKBONES)
def test_all_at_once_is_each_alone_for_any_backbone_and_batch(name):
    make, shares = BACKBONES[name]
    plain, model, added = expanded(make)
    for rows in (4, 1, HEADS, LENGTH, 2, 6):  # as many images as heads, or as tokens, decide nothing
        x = torch.randn(rows, LENGTH, WIDTH).double()
        assert worst(plain, model, added, x) < 1e-9, rows
        assert rows == 1 or shares is None or dtme.sharing_of(model).startswith("shared" if shares else "one by one")
    assert dtme.verify(model, torch.randn(3, LENGTH, WIDTH).double()) < 1e-9


@pytest.mark.parametrize("name", ["plain", "two towers", "frames", "skips of earlier tokens"])
def test_gradients_of_all_at_once_are_the_sums_of_each_alone(name):
    _, model, _ = expanded(BACKBONES[name][0])
    x = torch.randn(4, LENGTH, WIDTH).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x)

    def gradients(*calls):
        model.zero_grad()
        sum(p.square().sum() for out in calls for p in out.values()).backward()
        return [p.grad.clone() for p in model.parameters()]

    for a, b in zip(gradients(model(x)), gradients(*(model(x, task) for task in TASKS)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_parts_that_were_expanded_by_themselves():
    torch.manual_seed(0)
    two, x = Two().double().eval(), torch.randn(3, LENGTH, WIDTH).double()
    for part in (two.left, two.right):
        dtme.expand(part, dtme.ExpansionPlan(TASKS, 2, {"layers.0": TASKS}, {"layers.1": TASKS}))
        for parameter in (p for n, p in part.named_parameters() if ".dtme." in n):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model = dtme.MultiTaskModel(two, {task: nn.Identity() for task in TASKS}, features=lambda net, x: net(x))
    equals_each_alone(model, x)
    with pytest.raises(RuntimeError, match="Two holds 2 backbones expanded by themselves"):
        dtme.tasks(two, TASKS)
    with pytest.raises(RuntimeError, match="Two was wrapped, or built of parts, after they were expanded"):
        model.save_pretrained("nowhere")


def test_what_task_tokens_would_be_lost_in_is_refused():
    x = torch.randn(3, LENGTH, WIDTH).double()
    for name in ("attn", "norm1"):
        torch.manual_seed(0)
        net = OwnTransformer().double().eval()
        dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {"layers.1": TASKS}))
        setattr(net.layers[1], name, copy.deepcopy(getattr(OwnTransformer().double().layers[1], name)))
        with pytest.raises(RuntimeError, match=r"of block 'layers.1' was replaced after it was expanded"):
            net(x)


def test_shallow_copies_are_refused():
    _, model, _ = expanded(OwnTransformer)
    x = torch.randn(3, LENGTH, WIDTH).double()
    model(x)
    for replica in (model._replicate_for_data_parallel(), model.backbone._replicate_for_data_parallel()):
        if replica.__class__ is dtme.MultiTaskModel:
            replica.backbone = model.backbone._replicate_for_data_parallel()
        with pytest.raises(RuntimeError, match="is a shallow copy of one that was expanded"):
            replica(x)


class Dropping(nn.Module):
    """Leaves out whole blocks at random in training."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(OwnBlock(SDPA()) for _ in range(4))

    def forward(self, x):
        for block in self.layers:
            if not self.training or torch.rand([]) > 0.4:
                x = block(x)
        return x


@pytest.mark.parametrize("shared_prefix", ["auto", False])
def test_layers_dropped_at_random_are_dropped_for_all_tasks(shared_prefix):
    plain, model, added = expanded(Dropping, shared_prefix=shared_prefix)
    plain.train(), model.train()
    x = torch.randn(3, LENGTH, WIDTH).double()
    model(x)
    for seed in range(12):
        torch.manual_seed(seed)
        got = model(x)
        for task in TASKS:
            torch.manual_seed(seed)
            with concatenated(plain.backbone, added, task):
                torch.testing.assert_close(got[task], plain(x, task)[task], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("segments", [1, 2])
def test_checkpoints_of_several_blocks_find_their_tasks_again(segments, use_reentrant):
    class Segmented(OwnTransformer):
        segments = 0

        def forward(self, x):
            if not self.segments:
                return super().forward(x)
            return checkpoint_sequential(self.layers, self.segments, x, use_reentrant=use_reentrant)

    _, model, _ = expanded(partial(Segmented, 4))
    model.train()
    x = torch.randn(3, LENGTH, WIDTH).double().requires_grad_()

    def gradients():
        model.zero_grad()
        out = model(x) | {"again": model(x * 2, "depth")["depth"]}
        sum(p.square().sum() for p in out.values()).backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients()
    model.backbone.segments = segments
    for a, b in zip(gradients(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_part_run_again_on_unknown_tensors_is_an_error():
    _, model, _ = expanded(OwnTransformer)
    x = torch.randn(3, LENGTH, WIDTH).double().requires_grad_()
    block = model.backbone.layers[0]
    out = model(x)
    with pytest.raises(RuntimeError, match=r"block 'layers.0'.* again by activation checkpointing on other tensors"):
        out["depth"].register_hook(lambda gradient: block(x + 1) and None)
        out["depth"].sum().backward()


def test_one_block_may_be_called_by_itself_and_two_only_for_one_task():
    plain, model, added = expanded(OwnTransformer, partial_plan=False)
    net, x = model.backbone, torch.randn(2, LENGTH, WIDTH).double()
    with dtme.tasks(net, TASKS):
        parts = dtme.split(net.layers[0](x), TASKS)
        with pytest.raises(RuntimeError, match=r"'layers.2' was called after 'layers.0' outside of a call"):
            net.layers[2](x)
    for task in TASKS:
        w, b = (added[f"layers.0.dtme.{kind}.{task}"] for kind in ("weight", "bias"))
        torch.testing.assert_close(parts[task], plain.backbone.layers[0](x * w + b), rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match=r"'layers.0' was called outside of a call"):
        net.layers[0](x)
    with dtme.tasks(net, "depth"):
        torch.testing.assert_close(net.layers(x), model(x, "depth")["depth"], rtol=1e-10, atol=1e-10)


def test_wrapped_unwrapped_copied_and_moved_backbones_keep_predicting():
    x = torch.randn(4, LENGTH, WIDTH).double()
    _, model, _ = expanded(lambda: Wrapper(OwnTransformer()))
    want = model(x)
    assert dtme.is_expanded(model) and dtme.is_expanded(model.backbone.inner.layers[1])
    for backbone in (
        model.backbone.inner,
        Wrapper(model.backbone),
        Wrapper(Wrapper(model.backbone.inner)),
        copy.deepcopy(model.backbone),
        model.backbone.inner.layers,
    ):
        model.backbone = backbone
        for task, got in model(x).items():
            torch.testing.assert_close(got, want[task], rtol=1e-10, atol=1e-10)
        with dtme.tasks(backbone, ["normals", "depth"]) as names:
            parts = dtme.split(backbone(x), names)
        torch.testing.assert_close(parts["depth"], want["depth"], rtol=1e-10, atol=1e-10)
        with dtme.tasks(backbone, "depth"):
            torch.testing.assert_close(backbone(x), want["depth"], rtol=1e-10, atol=1e-10)
    plain = OwnTransformer().double().eval()
    model.backbone = plain
    assert not dtme.is_expanded(model) and torch.equal(model(x)["depth"], plain(x))


def test_copies_that_would_never_run_are_refused():
    """As peft's modules_to_save makes them."""
    _, model, _ = expanded(OwnTransformer)
    x, block = torch.randn(2, LENGTH, WIDTH).double(), model.backbone.layers[0]
    original = block.dtme
    block.dtme = copy.deepcopy(original)
    with pytest.raises(RuntimeError, match=r"added to block 'layers.0' were replaced by copies"):
        model(x)
    block.dtme = original
    original.weight = nn.ModuleDict()
    with pytest.raises(RuntimeError, match=r"added to block 'layers.0' were replaced by copies"):
        model(x)


def test_a_model_whose_forward_somebody_replaced_later_is_not_collapsed_by_half():
    _, model, _ = expanded(OwnTransformer)
    net, x = model.backbone, torch.randn(2, LENGTH, WIDTH).double()
    want, entry = model(x), net.forward
    net.forward = lambda x: entry(x)
    with pytest.raises(RuntimeError, match=r"OwnTransformer\.forward was replaced"):
        dtme.collapse(model)
    assert dtme.is_expanded(model) and torch.equal(model(x)["depth"], want["depth"])
    net.forward = entry
    dtme.collapse(model)
    assert not dtme.is_expanded(model) and "forward" not in vars(net)


def test_split_knows_what_has_just_been_returned():
    torch.manual_seed(0)
    net, x = OwnTransformer(), torch.randn(4, 5, WIDTH)
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 1, {"layers.1": TASKS}))
    with dtme.tasks(net, TASKS):
        output = net(x)
    for names in (TASKS[::-1], TASKS[:2], TASKS[0]):
        with pytest.raises(ValueError, match=rf"tasks must be \['{TASKS[0]}', .*, whose rows output holds"):
            dtme.split(output, names)
    assert list(dtme.split(output, TASKS)) == list(TASKS)
    assert list(dtme.split(2 * output, TASKS[::-1])) == list(TASKS[::-1])  # what is made of it is the caller's own
