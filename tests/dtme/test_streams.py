"""All tasks at once are each task alone, whatever a backbone does with its rows."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import dtme
from dtme.trees import tensors
from tests.dtme.clients import SDPA, TASKS, WIDTH, OwnBlock, OwnTransformer, concatenated

DEPTH, HEADS, LENGTH = 3, 3, 5


class Masked(SDPA):
    """Attention with something added to its scores."""

    def forward(self, x, bias=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Guided(OwnBlock):
    """A block that takes more than its tokens."""

    def __init__(self):
        super().__init__(Masked())

    def forward(self, x, bias=None, scale=None, skip=None, shifts=(), last=None):
        x = x if skip is None else x + skip.roll(1, 1)
        x = x if scale is None else x * scale
        x = x if last is None else x * last.permute(2, 0, 1)
        for shift in shifts:
            x = x + shift
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class Guiding(nn.Module):
    """Gives every block what ``make`` makes of its input and of earlier tokens."""

    def __init__(self, make):
        super().__init__()
        self.blocks, self.make = nn.ModuleList(Guided() for _ in range(DEPTH)), make

    def forward(self, x):
        states = [x]
        for block in self.blocks:
            x = block(x, **self.make(states))
            states.append(x)
        return x


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = OwnTransformer(2), OwnTransformer(2)

    def forward(self, x):
        return self.left(x).mean(1) * self.right(x.flip(1)).amax(1)


class Twice(nn.Module):
    """One encoder for two views of an image."""

    def __init__(self):
        super().__init__()
        self.encoder = OwnTransformer()

    def forward(self, x):
        return self.encoder(x) - self.encoder(x.flip(0)).flip(0)


class Frames(nn.Module):
    """Every image is two rows of the blocks."""

    def __init__(self):
        super().__init__()
        self.encoder = OwnTransformer()

    def forward(self, x):
        rows = torch.stack([x, -x], 1).flatten(0, 1)
        return self.encoder(rows).view(len(x), 2, *x.shape[1:]).sum(1)


class Mixing(nn.Module):
    """Rows of one batch are not independent of each other."""

    def __init__(self):
        super().__init__()
        self.encoder = OwnTransformer()

    def forward(self, x):
        y = self.encoder(x)
        return y - y.mean(0)


class Maps(nn.Module):
    """Reshapes its tokens by the batch of its input."""

    def __init__(self):
        super().__init__()
        self.encoder = OwnTransformer()

    def forward(self, x):
        return self.encoder(x).reshape(len(x), -1, WIDTH).transpose(1, 2)


class TokensFirst(nn.Module):
    """Returns (N, B, p)."""

    def __init__(self):
        super().__init__()
        self.encoder = OwnTransformer()

    def forward(self, x):
        return self.encoder(x).transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(OwnBlock(SDPA()), OwnBlock(SDPA()))

    def forward(self, x):
        for _ in range(3):
            x = self.layers(x)
        return x


class EarlyExit(nn.Module):
    """Leaves after a number of blocks that depends on its input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(OwnBlock(SDPA()) for _ in range(DEPTH))

    def forward(self, x):
        stop = 1 + int(x[0, 0, 0] > 0) * 2
        for block in self.layers[:stop]:
            x = block(x)
        return x


class Table(nn.Module):
    """Returns a table beside its tokens, which has nothing to do with the images."""

    def __init__(self):
        super().__init__()
        self.encoder, self.table = OwnTransformer(), nn.Parameter(torch.randn(9, 2))

    def forward(self, x):
        return self.encoder(x), self.table


def ramp(*shape):
    return torch.linspace(0, 1, torch.Size(shape).numel()).view(shape).double()


def per_image(states):
    return {"bias": torch.cdist(states[0], states[0])[:, None], "scale": states[0].mean((1, 2), keepdim=True)}


BACKBONES = {
    "plain": (OwnTransformer, True),
    "a bias per head": (lambda: Guiding(lambda s: {"bias": ramp(HEADS, 5, 5)}), True),
    "a bias per image": (lambda: Guiding(per_image), True),
    "a table of positions": (lambda: Guiding(lambda s: {"shifts": [ramp(5, WIDTH)]}), True),
    "a list of shifts per image": (lambda: Guiding(lambda s: {"shifts": [s[0][:, :1], s[0].new_ones(1, 1, 1)]}), True),
    "skips of earlier tokens": (lambda: Guiding(lambda s: {"skip": s[len(s) // 2]}), True),
    "images on the last axis": (lambda: Guiding(lambda s: {"last": s[0].mean((1, 2)).expand(1, 1, -1)}), False),
    "two towers": (Towers, False),
    "two views, one encoder": (Twice, False),
    "frames": (Frames, False),
    "rows that mix": (Mixing, False),
    "maps by the batch": (Maps, False),
    "tokens first": (TokensFirst, True),
    "a stack that recurs": (Recurrent, True),
    "early exit": (EarlyExit, None),
    "a table beside the tokens": (Table, True),
}  # fmt: skip


def expanded(make, partial_plan=True, **options):
    """A plain model, the same expanded, and what was added."""
    torch.manual_seed(0)
    plain = dtme.MultiTaskModel(make(), {task: nn.Identity() for task in TASKS}, features=lambda net, x: net(x))
    plain = plain.double().eval()
    model = copy.deepcopy(plain)
    blocks = [n for n, m in model.backbone.named_modules() if isinstance(m, OwnBlock)]
    some = TASKS[:1] if partial_plan else TASKS
    modulation = {blocks[0]: some, blocks[-1]: TASKS}
    plan = dtme.ExpansionPlan(TASKS, 2, modulation, {})
    dtme.expand(model, plan, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dtme." in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    added = {n.removeprefix("backbone."): p.detach() for n, p in model.named_parameters() if ".dtme." in n}
    return plain, model, added


def flat(tree):
    return torch.cat([part.flatten() for part in (tree if isinstance(tree, tuple) else (tree,))])


def worst(plain, model, added, x):
    """The largest difference between all tasks at once, each alone, and a plain model with hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at_once = model(x)
    found = 0.0
    for task in TASKS:
        with concatenated(plain.backbone, added, task):
            want = plain(x, task)[task]
        for got in (at_once[task], model(x, task)[task]):
            assert [t.shape for t in (got if isinstance(got, tuple) else (got,))] == [
                t.shape for t in (want if isinstance(want, tuple) else (want,))
            ]
            found = max(found, (flat(got) - flat(want)).abs().max().item())
    return found


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


def equals_each_alone(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = torch.get_rng_state()
        at_once = model(x)
        for task in TASKS:
            torch.set_rng_state(state)
            torch.testing.assert_close(at_once[task], model(x, task)[task], rtol=1e-9, atol=1e-9)


def test_training_is_compared_as_training():
    _, model, _ = expanded(Standardising)
    x = torch.randn(4, LENGTH, WIDTH).double()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    model(x)
    assert dtme.sharing_of(model) == "shared prefix"
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    model.train()
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


def test_methods_that_run_no_block_leave_rows_alone():
    vit = timm_vit().double().eval()
    dtme.expand(vit, dtme.ExpansionPlan(TASKS, 2, {"blocks.1": TASKS}))
    x = torch.randn(2, 3, 32, 32).double()
    with dtme.tasks(vit, TASKS):
        assert len(vit.forward_head(vit.forward_features(x))) == len(vit(x)) == 3 * len(x)


def test_parts_that_were_expanded_by_themselves():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = OwnTransformer(2), OwnTransformer(2)

        def forward(self, x):
            return self.right(self.left(x))

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


# --- features and methods of real backbones ---------------------------------------------------------------------------


def timm_vit(depth=4, **options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=WIDTH, depth=depth, num_heads=3, num_classes=0, **options
    )


def last_map(vit, x):
    return vit.forward_intermediates(x, indices=[3], intermediates_only=True)


FEATURES = {
    "reshaped by the batch of the input": lambda vit, x: vit.forward_features(x).reshape(len(x), -1, WIDTH).mean(1),
    "viewed as maps": lambda vit, x: vit.forward_features(x)[:, 1:].view(len(x), 4, 4, WIDTH).permute(0, 3, 1, 2),
    "beside a skip of the input": lambda vit, x: vit.forward_features(x).mean(1) + x.mean((1, 2, 3))[:, None],
    "tokens and pixels": lambda vit, x: (vit.forward_features(x)[:, 0], x.mean((2, 3))),
    "the last map": last_map,
    "maps of all blocks": lambda vit, x: vit.forward_intermediates(x, intermediates_only=True),
    "tokens of two blocks": lambda vit, x: vit.forward_intermediates(
        x, indices=[0, 2], output_fmt="NLC", intermediates_only=True
    ),
    "a map and the tokens": lambda vit, x: vit.forward_intermediates(x, indices=[1]),
    "stopped early": lambda vit, x: vit.forward_intermediates(
        x, indices=[1], stop_early=True, output_fmt="NLC", intermediates_only=True
    ),
    "flattened over the batch": lambda vit, x: vit.forward_features(x).flatten(0, 1).view(len(x), -1),
    "standardised over the batch": lambda vit, x: F.normalize(vit.forward_features(x)[:, 0], dim=0),
}


@pytest.mark.parametrize("name", FEATURES)
def test_functions_for_features_see_one_number_of_rows(name):
    model = dtme.MultiTaskModel(timm_vit(), {task: nn.Identity() for task in TASKS}, FEATURES[name]).double().eval()
    plan = dtme.ExpansionPlan(TASKS, 2, {"blocks.0": TASKS[:2], "blocks.3": TASKS}, {"blocks.1": TASKS[:1]})
    dtme.expand(model, plan)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if ".dtme." in n):
            parameter.add_(torch.randn_like(parameter))
    for rows in (6, 1, 3):
        x = torch.randn(rows, 3, 32, 32).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            at_once = model(x)
        for task in TASKS:
            for got, want in zip(tensors(at_once[task]), tensors(model(x, task)[task]), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_methods_called_in_any_order_under_one_choice():
    vit = timm_vit().double().eval()
    dtme.expand(vit, dtme.ExpansionPlan(TASKS, 2, {"blocks.0": TASKS, "blocks.3": TASKS}, {"blocks.1": TASKS}))
    x, tap = torch.randn(3, 3, 32, 32).double(), {"indices": [1], "output_fmt": "NLC", "intermediates_only": True}
    with torch.no_grad():
        for parameter in (p for n, p in vit.named_parameters() if ".dtme." in n):
            parameter.add_(torch.randn_like(parameter))
    calls = {
        "all blocks": lambda: vit.forward_intermediates(x, **tap)[0],
        "stopped early": lambda: vit.forward_intermediates(x, stop_early=True, **tap)[0],
        "the whole": lambda: vit(x),
        "features": lambda: vit.forward_features(x),
    }
    want = {}
    for name, call in calls.items():
        for task in TASKS:
            with dtme.tasks(vit, task):
                want[name, task] = call()
    with dtme.tasks(vit, TASKS):
        for name in ["stopped early", "stopped early", "all blocks", "the whole", "stopped early", "features", *calls]:
            for task, got in dtme.split(calls[name](), TASKS).items():
                torch.testing.assert_close(got, want[name, task], rtol=1e-9, atol=1e-9)


class Detector(nn.Module):
    """Queries of its own attend to what the encoder makes of the image."""

    def __init__(self):
        super().__init__()
        options = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
        layer = nn.TransformerEncoderLayer(WIDTH, 3, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 3, **options), 2)
        self.queries = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x):
        return self.decoder(self.queries.expand(len(x), -1, -1), self.encoder(x))


@pytest.mark.parametrize("rows", [6, 4, 1])
def test_decoders_that_attend_to_an_expanded_encoder(rows):
    torch.manual_seed(0)
    detector, x = Detector().double().eval(), torch.randn(rows, LENGTH, WIDTH).double()
    dtme.expand(detector, dtme.ExpansionPlan(TASKS, 2, {"encoder.layers.0": TASKS}, {"encoder.layers.1": ("depth",)}))
    with torch.no_grad():
        for parameter in (p for n, p in detector.named_parameters() if ".dtme." in n):
            parameter.add_(torch.randn_like(parameter))
    with warnings.catch_warnings(), dtme.tasks(detector, TASKS):
        warnings.simplefilter("ignore")
        parts = dtme.split(detector(x), TASKS)
    for task in TASKS:
        with dtme.tasks(detector.encoder, task):
            memory = detector.encoder(x)
        want = detector.decoder(detector.queries.expand(rows, -1, -1), memory)
        torch.testing.assert_close(parts[task], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("chosen", [["layers.0"], ["layers.2"], ["layers.0", "layers.1"]], ids=str)
def test_encoders_that_would_pack_padded_batches(gradients, chosen):
    """torch's encoder as it comes makes nested tensors of a padded batch, in evaluation mode at least."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 48, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3).double().eval()
    before = dict(vars(encoder))
    x, hidden = torch.randn(3, 5, WIDTH).double(), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    dtme.expand(encoder, dtme.ExpansionPlan(TASKS, 2, dict.fromkeys(chosen, TASKS), {chosen[-1]: TASKS[:1]}))
    with torch.no_grad():
        for parameter in (p for n, p in encoder.named_parameters() if ".dtme." in n):
            parameter.add_(torch.randn_like(parameter))
    added = {n: p.detach() for n, p in encoder.named_parameters() if ".dtme." in n}
    with torch.set_grad_enabled(gradients), dtme.tasks(encoder, TASKS):
        parts = dtme.split(encoder(x, src_key_padding_mask=hidden), TASKS)
    dtme.collapse(encoder)
    assert dict(vars(encoder)) == before
    for task in TASKS:
        y = x
        for i, block in enumerate(encoder.layers):
            w, b, tokens = (added.get(f"layers.{i}.dtme.{kind}.{task}") for kind in ("weight", "bias", "tokens"))
            y = y if w is None else y * w + b
            tokens = x[0, :0] if tokens is None else tokens
            longer = F.pad(hidden, (0, len(tokens)))
            y = block(torch.cat([y, tokens.expand(3, -1, -1)], 1), src_key_padding_mask=longer)[:, :5]
        torch.testing.assert_close(parts[task][~hidden], y[~hidden], rtol=1e-10, atol=1e-10)


# --- dropped, interrupted, recomputed ---------------------------------------------------------------------------------


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


# --- called in parts --------------------------------------------------------------------------------------------------


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


# --- what says "expanded" ---------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


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
