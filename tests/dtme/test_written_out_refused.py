"""Attention that is written out and does what task tokens do not support: refused by name, or kept right."""

import threading
from functools import partial

import pytest
import torch
from torch import nn

import dtme
from dtme.blocks import find_blocks
from tests.dtme.backbones import timm_vit
from tests.dtme.test_written_out import (
    HEADS,
    PLAN,
    TASKS,
    TOKENS,
    WIDTH,
    Attention,
    Block,
    merged,
    moved,
    of_blocks,
    timm_like,
)


def talking_heads(self, q, k, v, mask):
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT, self.logit_scale[:, 0].expand(-1, HEADS))
    return merged(scores.softmax(-1) @ v)


def capped(self, q, k, v, mask):
    return merged((10 * (q @ k.mT / 10).tanh()).softmax(-1) @ v)


def clamped_in_place(self, q, k, v, mask):
    scores = q @ k.mT
    scores.clamp_(max=1.0)
    return merged(scores.softmax(-1) @ v)


def over_the_queries(self, q, k, v, mask):
    return merged((q @ k.mT).softmax(-2) @ v)


def renormalised(self, q, k, v, mask):
    weights = (q @ k.mT).softmax(-1)
    return merged((weights / weights.sum(-1, keepdim=True)) @ v)


def written_into(self, q, k, v, mask):
    scores = q @ k.mT
    scores[:, :, 0].mul_(0.5)
    return merged(scores.softmax(-1) @ v)


def values_first(self, q, k, v, mask):
    return merged((v.mT @ (q @ k.mT).softmax(-1).mT).mT)


def twice(self, q, k, v, mask):
    v = (q @ k.mT).softmax(-1) @ v
    return merged((q @ k.mT).softmax(-1) @ v)


def without_gradients(self, q, k, v, mask):
    with torch.no_grad():
        scores = q @ k.mT
    return merged(scores.softmax(-1) @ v)


REFUSED = [talking_heads, capped, clamped_in_place, over_the_queries, renormalised, written_into, values_first, twice]


@pytest.mark.parametrize("write", REFUSED)
def test_what_is_not_known_is_refused_with_ways_out_and_nothing_is_changed(write):
    net = of_blocks(lambda: Attention(write))
    before, x = dict(net.state_dict()), torch.randn(2, TOKENS, WIDTH).double()
    want = net(x)
    with pytest.raises(ValueError, match=r"block '1'.*(attention|Attention)"):
        dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {"1": TASKS}))
    assert not dtme.is_expanded(net) and before.keys() == net.state_dict().keys()
    torch.testing.assert_close(net(x), want, rtol=0, atol=0)
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {"1": TASKS}))  # modulation works all the same
    moved(net)
    with dtme.tasks(net, TASKS):
        net(x).sum().backward()


class Tenth(torch.autograd.Function):
    """Hands on what it is given, and a tenth of the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad / 10


def tenth(self, q, k, v, mask):
    return merged(Tenth.apply(q @ k.mT * self.scale).softmax(-1) @ v)


@pytest.mark.parametrize(
    ("write", "says"), [(without_gradients, "in another without"), (tenth, "not compute gradients as")]
)
@pytest.mark.parametrize("copies", [True, False])
def test_gradients_of_the_attentions_own_making_are_refused(write, says, copies):
    net = of_blocks(lambda: Attention(write))
    if not copies:
        net[1].attn.lock = threading.Lock()
    with pytest.raises(ValueError, match=rf"block '1'.*{says}"):
        dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {"1": TASKS}))
    assert not dtme.is_expanded(net)


class Keeping(Attention):
    """Maps that are looked at afterwards stay where the attention has put them."""

    def __init__(self):
        super().__init__(timm_like)
        self.kept = []

    def forward(self, x, extra=None, mask=None):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q(x), *self.kv(x).chunk(2, -1)))
        scores = q @ k.mT * self.scale
        self.weights = scores.softmax(-1)
        self.kept.append({"raw": scores})
        return self.proj(merged(self.weights @ v))


def test_maps_kept_by_the_attention_are_tensors_with_the_rows_of_all_tasks():
    net, x = of_blocks(Keeping), torch.randn(4, TOKENS, WIDTH).double()
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, *PLAN))
    assert not any(block.attn.kept for block in net)  # it was tried on a copy
    moved(net)
    with dtme.tasks(net, TASKS):
        net(x)
    kept = net[2].attn.weights, net[2].attn.kept[-1]["raw"]
    for task in TASKS:
        with dtme.tasks(net, task):
            net(x)
        for some, alone_ in zip(kept, (net[2].attn.weights, net[2].attn.kept[-1]["raw"]), strict=True):
            assert isinstance(some, torch.Tensor)
            torch.testing.assert_close(dtme.split(some, TASKS)[task], alone_)
    assert (net[2].attn.weights.sum(-1) < 1).all()  # the rest goes to the task tokens


def test_hooks_that_would_see_no_tensors_are_refused():
    net, seen = of_blocks(lambda: Attention(timm_like)), []
    hook = net[1].attn.drop.register_forward_hook(lambda module, args, output: seen.append(output))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"block '1': a hook hangs on the Dropout .* let the attention return them"):
        dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {"1": TASKS}))
    assert not dtme.is_expanded(net) and not seen and torch.equal(before, torch.get_rng_state())
    hook.remove()
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {"1": TASKS}))


def kept_outside(store, self, q, k, v, mask):
    weights = (q @ k.mT * self.scale).softmax(-1)
    store.append(weights)
    return merged(weights @ v)


def test_maps_kept_by_somebody_else_are_refused():
    net = of_blocks(lambda: Attention(partial(kept_outside, [])))
    with pytest.raises(ValueError, match=r"block '1': somebody outside of its attention keeps .*clone\(\)"):
        dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {"1": TASKS}))


class Centred(nn.Module):
    """Takes off a mean over everything that it has seen, a new tensor every time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 1, 1, 1))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean().view(1, 1, 1, 1)
        return x - self.mean


@pytest.mark.parametrize("write", [timm_like, "library"])
@pytest.mark.parametrize("kind", ["spectral norm", "batch norm", "its own"])
def test_statistics_are_not_taken_of_task_tokens(kind, write):
    """In training; in evaluation mode such a module is a map like any other."""
    if write == "library":
        net = timm_vit(depth=3)
        blocks, x = net.blocks, torch.randn(2, 3, 32, 32)
        attention, linear = blocks[1].attn, "qkv"
    else:
        net = blocks = of_blocks(lambda: Attention(timm_like))
        attention, x, linear = blocks[1].attn, torch.randn(2, TOKENS, WIDTH).double(), "q"
    if kind == "spectral norm":
        nn.utils.parametrizations.spectral_norm(getattr(attention, linear))
    else:
        attention.k_norm = nn.BatchNorm2d(attention.num_heads) if kind == "batch norm" else Centred()
        attention.k_norm.to(x.dtype)
    before, name = {key: value.clone() for key, value in net.state_dict().items()}, list(find_blocks(net))[1]
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {name: TASKS}))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    with dtme.tasks(net, "a"):
        net.eval()(x)
        with pytest.raises(
            ValueError, match=rf"block '{name}': the (_SpectralNorm|BatchNorm2d|Centred) before its attention"
        ):
            net.train()(x)
        for module in attention.modules():
            if isinstance(module, (nn.BatchNorm2d, Centred)) or type(module).__name__ == "_SpectralNorm":
                module.eval()
        net(x).sum().backward()


def test_two_blocks_that_share_one_attention_are_told_of():
    net = of_blocks(lambda: Attention(timm_like))
    net[2].attn = net[0].attn
    for names in (("0", "2"), ("2",), ("0",)):
        with pytest.raises(
            ValueError, match=rf"blocks '{names[0]}' and '.' share one Attention, which the task tokens"
        ):
            dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, dict.fromkeys(names, TASKS)))
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {"0": TASKS}, {"1": TASKS}))


class TwoNorms(Block):
    """As in models of several modalities: another norm for some tokens, where an argument says which."""

    def __init__(self):
        super().__init__(Attention(timm_like))
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask=None):
        normed = self.norm1(x) if mask is None else torch.where(mask, self.other(x), self.norm1(x))
        return x + self.mlp(self.attn(normed))


class MaskedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(TwoNorms() for _ in range(2))

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return x


def test_an_attention_that_is_fed_otherwise_than_it_was_tried_is_refused():
    torch.manual_seed(0)
    net, x = MaskedNet().double(), torch.randn(2, TOKENS, WIDTH).double()
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {"blocks.1": TASKS}))
    with dtme.tasks(net, "a"):
        net(x)
        with pytest.raises(ValueError, match=r"block 'blocks.1': its attention is not given what it was given when"):
            net(x, torch.rand(2, TOKENS, 1) > 0.5)
