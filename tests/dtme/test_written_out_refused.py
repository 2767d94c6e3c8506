"""Attention that is written out and does what task tokens do not support: refused by name, or kept right."""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
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
    ("write", "says"), [(without_gradients, "in another without"), (tenth, "not compute outputs and gradients as")]
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
    """Takes off a mean over everything that it has seen in training."""

    def __init__(self, kind):
        super().__init__()
        if kind == "buffer":
            self.register_buffer("mean", torch.zeros(()))
        else:
            self.mean = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        if self.training and isinstance(self.mean, nn.Parameter):
            self.mean.copy_(0.9 * self.mean + 0.1 * x.detach().mean())
        elif self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean


KEEPING = {
    "spectral norm": lambda attention, linear: nn.utils.parametrizations.spectral_norm(getattr(attention, linear)),
    "old spectral norm": lambda attention, linear: nn.utils.spectral_norm(getattr(attention, linear)),
    "batch norm": lambda attention, linear: setattr(attention, "k_norm", nn.BatchNorm2d(attention.num_heads)),
    "buffer": lambda attention, linear: setattr(attention, "k_norm", Centred("buffer")),
    "parameter": lambda attention, linear: setattr(attention, "k_norm", Centred("parameter")),
}


@pytest.mark.parametrize("of_library", [False, True])
@pytest.mark.parametrize("kind", KEEPING)
def test_statistics_are_not_taken_of_task_tokens(kind, of_library):
    """In training; in evaluation mode such a module is a map like any other."""
    net = timm_vit(depth=3) if of_library else of_blocks(lambda: Attention(timm_like))
    x = (torch.randn(2, 3, 32, 32) if of_library else torch.randn(2, TOKENS, WIDTH)).double()
    name, block = list(find_blocks(net).items())[1]
    KEEPING[kind](block.attn, "qkv" if of_library else "q")
    net.double()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {name: TASKS}))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    with dtme.tasks(net, "a"):
        net.eval()(x)
        with pytest.raises(ValueError, match=rf"block '{name}': the .* before or in its attention keeps statistics"):
            net.train()(x)
        block.attn.eval()
        net(x).sum().backward()


def test_statistics_that_came_later_are_not_taken_either():
    net, x = of_blocks(lambda: Attention(timm_like, norm=True)), torch.randn(2, TOKENS, WIDTH).double()
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {"1": TASKS}))
    net[1].attn.k_norm = nn.BatchNorm2d(HEADS).double()
    with dtme.tasks(net, "a"):
        with pytest.raises(ValueError, match="block '1': the BatchNorm2d before or in its attention keeps statistics"):
            net.train()(x)
        nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()(x)


def in_training_only(change):
    def write(self, q, k, v, mask):
        scores = q @ k.mT * self.scale
        return merged((change(scores) if self.training else scores).softmax(-1) @ v)

    return write


@pytest.mark.parametrize("change", [Tenth.apply, lambda scores: scores - 0.5 * scores.mean(-2, keepdim=True)])
def test_what_is_done_in_training_only_is_tried_too(change):
    net = of_blocks(lambda: Attention(in_training_only(change)))
    with pytest.raises(ValueError, match="block '1'"):
        dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {"1": TASKS}))


def with_frozen_mask(self, q, k, v, mask):
    seen = F.pad(self.table, (0, k.shape[-2] - TOKENS), value=1.0)
    return merged((q @ k.mT * self.scale + seen.log()).softmax(-1) @ v)


def test_gradients_that_are_no_numbers_prove_nothing():
    net = of_blocks(lambda: Attention(with_frozen_mask, table=True))
    for block in net:
        block.attn.table = nn.Parameter((torch.rand(TOKENS, TOKENS) < 0.8).double().fill_diagonal_(1), False)
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, {}, {"1": TASKS}))


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
