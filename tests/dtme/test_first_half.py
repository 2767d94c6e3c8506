"""Plain pre-norm blocks run their first half at once, by ``modulate_concat_attention``; all others through the seam."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dtme
import dtme_kernels
from dtme.blocks import find_blocks
from dtme_kernels.testing import make
from tests.dtme.clients import CLIENTS, TASKS

PLAIN = ["transformers ViT", "transformers DINOv2", "timm ViT"]


@pytest.fixture
def calls(monkeypatch):
    """Names of the operations that attend, as they are called; ``warm`` a model first, whose first call compares."""
    found = []

    def counted(name, function, *args, **options):
        found.append(name)
        return function(*args, **options)

    for name in ("modulate_concat_attention", "expanded_attention"):
        monkeypatch.setattr(dtme_kernels, name, partial(counted, name, getattr(dtme_kernels, name)))
    return found


def expanded_everywhere(model, modulated=(0, 1, 2), tasks=TASKS, **options):
    blocks = list(find_blocks(model.backbone))
    plan = dtme.ExpansionPlan(TASKS, 2, {blocks[i]: TASKS for i in modulated}, dict.fromkeys(blocks, tasks))
    return dtme.expand(model, plan, **options)


def warm(model, x, calls):
    """The first call of its kind is compared with every task alone."""
    model(x)
    calls.clear()


def through_the_seam(model, x):
    """A hook that only looks makes every block run through its seam."""
    handles = [module.register_forward_pre_hook(lambda *_: None) for module in model.backbone.modules()]
    found = model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("client", CLIENTS)
def test_which_blocks_run_at_once(build, randomise, calls, client):
    model, x = build(client)
    randomise(expanded_everywhere(model, modulated=(0, 2)))
    warm(model, x, calls)
    got = model(x)
    assert calls == [("modulate_concat_attention" if client in PLAIN else "expanded_attention")] * 3
    calls.clear()
    want = through_the_seam(model, x)
    assert calls == ["expanded_attention"] * 3
    for task in TASKS:
        torch.testing.assert_close(got[task], want[task], rtol=1e-11, atol=1e-12)
    calls.clear()
    model(x, "depth")
    assert calls[0] == ("modulate_concat_attention" if client in PLAIN else "expanded_attention")


@pytest.mark.parametrize("client", PLAIN)
def test_gradients_are_those_of_the_seam(build, randomise, client):
    model, x = build(client)
    randomise(expanded_everywhere(model))
    gradients = [
        torch.autograd.grad(sum(p.square().sum() for p in run(x).values()), list(model.parameters()), allow_unused=True)
        for run in (model, lambda x: through_the_seam(model, x))
    ]
    for got, want in zip(*gradients, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_checkpointed_blocks_run_at_once_again(build, randomise, calls):
    model, x = build("timm ViT")
    randomise(expanded_everywhere(model))
    model.train()

    def gradients():
        loss = sum(p.square().sum() for p in (model(x, "depth") | model(x, ["semseg", "normals"])).values())
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    want = gradients()
    model.backbone.set_grad_checkpointing(True)
    calls.clear()
    for a, b in zip(gradients(), want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert calls == ["modulate_concat_attention"] * 12  # two choices of tasks, three blocks, each twice


BLOCKS = {
    "the norm read twice": lambda b, x: x + b.attn(h := b.norm1(x)) + b.mlp(h),
    "normed residual": lambda b, x: (h := b.norm1(x)) + b.attn(h),
    "causal inside": lambda b, x: x + b.attn(b.norm1(x), is_causal=True),
    "mask inside": lambda b, x: x + b.attn(b.norm1(x), attn_mask=x.new_ones(5, 5).tril().bool()),
    "dropout between": lambda b, x: x + b.attn(F.dropout(b.norm1(x), 0.5, b.training)),
    "scaled in place": lambda b, x: x + b.attn(b.norm1(x)).mul_(2),
    "attention checkpointed": lambda b, x: x + checkpoint(b.attn, b.norm1(x), use_reentrant=False),
    "attention checkpointed, reentrant": lambda b, x: x + checkpoint(b.attn, b.norm1(x), use_reentrant=True),
    "half checkpointed": lambda b, x: x + checkpoint(lambda y: b.attn(b.norm1(y)), x, use_reentrant=False),
}


class Written(nn.Module):
    """A block as somebody may have written it around timm's attention."""

    def __init__(self, kind):
        super().__init__()
        from timm.layers.attention import Attention

        self.kind, self.norm1, self.attn, self.mlp = kind, nn.LayerNorm(24), Attention(24, 3), nn.Linear(24, 24)

    def forward(self, x):
        return BLOCKS[self.kind](self, x)


@pytest.mark.parametrize("kind", BLOCKS)
def test_whatever_else_a_block_does_stays(randomise, kind):
    torch.manual_seed(0)
    model = dtme.MultiTaskModel(nn.Sequential(Written(kind)), {task: nn.Linear(24, 2) for task in TASKS}).double()
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {"0": TASKS}, {"0": TASKS}, {"0": 24}))
    randomise(model)
    x, found = make(3, 5, 24, dtype=torch.float64, requires_grad=True), []
    for run in (model, lambda x: through_the_seam(model, x)):
        torch.manual_seed(1)
        out = run(x)
        loss = sum(p.square().sum() for p in out.values())
        model.zero_grad()
        loss.backward()  # what reentrant checkpointing asks for
        found.append([*out.values(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_norm_that_somebody_patched_is_left_alone(build):
    model, x = build("timm ViT")
    norm = model.backbone.blocks[1].norm1
    patched = norm.forward = partial(type(norm).forward, norm)
    expanded_everywhere(model)
    model(x)
    dtme.collapse(model)
    assert norm.forward is patched


class Low(nn.Linear):
    """Somebody's own linear layer, as an adapter method would put there."""

    def forward(self, x):
        return super().forward(x) * 2


def replace_projection(model):
    for module in model.backbone.modules():
        if hasattr(module, "qkv"):
            module.qkv.__class__ = Low


def no_bias(model):
    for module in model.backbone.modules():
        if hasattr(module, "norm1"):
            module.norm1.bias = None


def watch(model):
    for module in model.backbone.modules():
        if hasattr(module, "norm1"):
            module.norm1.register_forward_hook(lambda module, args, output: output * 1.5)


def drop(model):
    model.train()
    for module in model.backbone.modules():
        if hasattr(module, "attn_drop"):
            module.attn_drop.p = 1e-9


@pytest.mark.parametrize("change", [replace_projection, no_bias, watch, drop])
def test_what_is_not_plain_runs_through_the_seam_and_right(build, randomise, naive, calls, change):
    model, x = build("timm ViT")
    change(model)
    plain = dtme.MultiTaskModel(model.backbone, dict(model.heads))
    expanded_everywhere(model)
    randomise(model)
    warm(model, x, calls)
    got = model(x)
    assert calls == ["expanded_attention"] * 3
    added = {n.removeprefix("backbone."): p.detach() for n, p in model.named_parameters() if ".dtme." in n}
    dtme.collapse(model)
    if change is not drop:
        for task in TASKS:
            torch.testing.assert_close(got[task], naive(plain, added, task, x), rtol=1e-10, atol=1e-10)


def test_blocks_where_only_some_tasks_have_tokens_run_through_the_seam(build, calls):
    model, x = build("timm ViT")
    expanded_everywhere(model, tasks=("depth",))
    warm(model, x, calls)
    model(x)
    assert calls.count("modulate_concat_attention") == 0
    calls.clear()
    model(x, "depth")
    assert calls == ["modulate_concat_attention"] * 3


def test_batch_norm_and_exported_tasks_run_through_the_seam(build, calls):
    model, x = build("timm ViT")
    single = expanded_everywhere(model).export_task("depth")
    single(x)
    assert "modulate_concat_attention" not in calls
    dtme.collapse(model)
    expanded_everywhere(model, modulator="batch_norm")
    calls.clear()
    model(x)
    assert "modulate_concat_attention" not in calls


def test_an_interrupted_forward_leaves_nothing_behind(build, randomise):
    model, x = build("timm ViT")
    randomise(expanded_everywhere(model))
    want = model(x)

    def interrupt(module, args):
        raise KeyboardInterrupt

    norm = model.backbone.blocks[1].norm1
    handle = model.backbone.blocks[0].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    assert all(torch.equal(model(x)[task], want[task]) for task in TASKS)
    assert norm(x.new_ones(1, 2, 24)).std() > 0  # and a norm called by itself is a norm
    assert "forward" not in vars(dtme.collapse(model).backbone.blocks[1].norm1)
