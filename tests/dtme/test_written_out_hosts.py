"""Written-out attention in the hosts it is found in: windows, coarser keys, prompts, maps as a second output."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtme
from dtme.blocks import find_blocks
from tests.dtme.test_clients import transformers_model
from tests.dtme.test_written_out import (
    HEADS,
    PLAN,
    TASKS,
    TOKENS,
    WIDTH,
    Attention,
    Block,
    alone,
    check_against_concatenation,
    merged,
    moved,
    of_blocks,
    timm_like,
)

SIDE, WINDOW = 8, 4


class WindowAttention(nn.Module):
    """As Swin's first release: a bias for every pair of places, a mask for every window."""

    def __init__(self):
        super().__init__()
        self.scale, self.qkv, self.proj = 2.0, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(49, HEADS))
        self.register_buffer("index", torch.randint(0, 49, (WINDOW**2, WINDOW**2)))

    def forward(self, x, mask=None, extra=None):
        rows, n, _ = x.shape
        qkv = self.qkv(x if extra is None else torch.cat([x, extra.repeat_interleave(rows // len(extra), 0)], 1))
        q, k, v = qkv.reshape(rows, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        q = q[:, :, :n] * self.scale
        attn = q @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        t = k.shape[2] - n
        attn = attn + F.pad(bias, (0, t)).unsqueeze(0)
        if mask is not None:
            w = mask.shape[0]
            attn = attn.view(rows // w, w, HEADS, n, n + t) + F.pad(mask, (0, t)).unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, HEADS, n, n + t)
        return self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(rows, n, WIDTH))


class WindowBlock(Block):
    def __init__(self, shift=0, size=SIDE):
        super().__init__(WindowAttention())
        self.input_resolution, self.shift, self.size = (size, size), shift, size
        mask = torch.zeros(4, WINDOW**2, WINDOW**2)
        mask[1, :8, 8:] = mask[2, 8:, :8] = -100.0
        self.register_buffer("mask", mask if shift else None)

    def forward(self, x, extra=None):
        rows, shortcut, x = len(x), x, self.norm1(x).unflatten(1, (self.size, self.size))
        x = F.pad(x, (0, 0, 0, SIDE - self.size, 0, SIDE - self.size))
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = x.view(rows, 2, WINDOW, 2, WINDOW, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, WINDOW**2, WIDTH)
        x = self.attn(x, self.mask, None if extra is None else self.norm1(extra))
        x = x.view(rows, 2, 2, WINDOW, WINDOW, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(rows, SIDE, SIDE, WIDTH)
        x = torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x
        x = shortcut + x[:, : self.size, : self.size].flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class ReducingAttention(Attention):
    """As PVT's: keys and values of the grid's coarser tokens; the oracle's tokens join those as they are."""

    def __init__(self, ratio, norm):
        super().__init__(timm_like)
        self.ratio = ratio
        if ratio > 1:
            self.sr = nn.Conv2d(WIDTH, WIDTH, ratio, ratio)
            self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()

    def forward(self, x, H, W, extra=None):
        rows, n, p = x.shape
        q = self.q(x).reshape(rows, n, HEADS, -1).permute(0, 2, 1, 3)
        if self.ratio > 1:
            x_ = x.permute(0, 2, 1).reshape(rows, p, H, W)
            x = self.norm(self.sr(x_).reshape(rows, p, -1).permute(0, 2, 1))
        if extra is not None:
            x = torch.cat([x, extra], 1)
        k, v = self.kv(x).reshape(rows, -1, 2, HEADS, p // HEADS).permute(2, 0, 3, 1, 4)
        return self.proj(self.write(self, q, k, v, None))


class ReducingBlock(Block):
    def forward(self, x, H, W, extra=None):
        x = x + self.attn(self.norm1(x), H, W, None if extra is None else self.norm1(extra))
        return x + self.mlp(self.norm2(x))


class OnGrid(nn.Sequential):
    def forward(self, x):
        for block in self:
            x = block(x, SIDE, SIDE)
        return x


def alone_on_grid(net, added, x, task):
    for name, block in net.named_children():
        x = x * added.get(f"{name}.dtme.weight.{task}", 1.0) + added.get(f"{name}.dtme.bias.{task}", 0.0)
        tokens = added.get(f"{name}.dtme.tokens.{task}")
        x = block(x, SIDE, SIDE, None if tokens is None else tokens.expand(len(x), -1, -1))
    return x


@pytest.mark.parametrize("size", [SIDE, 6], ids=["whole windows", "padded windows"])
def test_windows_join_the_task_tokens_each(size):
    torch.manual_seed(0)
    net = nn.Sequential(*[WindowBlock(shift, size) for shift in (0, 2, 0)]).double().eval()
    check_against_concatenation(net, torch.randn(3, size * size, WIDTH).double())


@pytest.mark.parametrize("norm", [True, False])
def test_coarser_keys_and_values_are_joined_by_the_task_tokens_as_they_are(norm):
    torch.manual_seed(0)
    net = OnGrid(*[ReducingBlock(ReducingAttention(ratio, norm)) for ratio in (4, 2, 1)]).double().eval()
    x = torch.randn(3, SIDE * SIDE, WIDTH).double()
    check_against_concatenation(net, x, oracle=alone_on_grid)


HIERARCHICAL = {
    "Pvt": {"depths": [1, 2, 1, 1], "image_size": 64, "sequence_reduction_ratios": [8, 4, 2, 1]},
    "Segformer": {"depths": [1, 2, 1, 1], "sr_ratios": [8, 4, 2, 1]},
}


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_transformers_with_coarser_keys_equal_concatenation_to_what_is_projected(name, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [WIDTH] * 4, "num_attention_heads": [HEADS] * 4}
    net = transformers_model(name, **sizes, **HIERARCHICAL[name]).double().eval()
    blocks, tasks, x = list(find_blocks(net)), ("a", "b"), torch.randn(2, 3, 64, 64).double()
    names = blocks[1], blocks[2], blocks[4]
    expansion = {names[0]: ("a",), names[1]: tasks, names[2]: tasks}
    dtme.expand(net, dtme.ExpansionPlan(tasks, 2, {names[1]: ("b",)}, expansion))
    added = moved(net)
    with dtme.tasks(net, tasks):
        got = dtme.split(net(x).last_hidden_state, tasks)
    dtme.collapse(net)
    for task in tasks:
        trained = [p for name, p in added.items() if name.endswith(task)]
        with monkeypatch.context() as patch:
            handles = [joined_by(net.get_submodule(block), block, added, task, patch) for block in names]
            want = net(x).last_hidden_state
        torch.testing.assert_close(got[task], want, rtol=0, atol=1e-10)
        mine, theirs = (torch.autograd.grad(y.square().sum(), trained, retain_graph=True) for y in (got[task], want))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        for handle in [handle for some in handles for handle in some]:
            handle.remove()


def joined_by(block, name, added, task, patch):
    """Modulate what goes into a block, and append what its task tokens project to to its keys and values."""
    weight, bias, tokens = (added.get(f"{name}.dtme.{part}.{task}") for part in ("weight", "bias", "tokens"))
    handles = []
    if weight is not None:
        handles.append(block.register_forward_pre_hook(lambda block, args: (args[0] * weight + bias, *args[1:])))
    if tokens is None:
        return handles
    norm = block.layer_norm_1 if hasattr(block, "layer_norm_1") else block.layernorm_before
    if hasattr(block.attention, "self"):  # it takes as many as its projections give
        normed = norm(tokens).expand(2, -1, -1)
        for layer in (block.attention.self.key, block.attention.self.value):
            handles.append(layer.register_forward_pre_hook(lambda layer, args: (torch.cat([args[0], normed], 1),)))
        return handles
    task_kv = [
        layer(norm(tokens)).unflatten(-1, (HEADS, -1)).transpose(0, 1).expand(2, -1, -1, -1)
        for layer in (block.attention.k_proj, block.attention.v_proj)
    ]
    plain, inside = F.scaled_dot_product_attention, []

    def attend(query, *key_value, **options):
        if inside:
            key_value = [torch.cat(pair, 2) for pair in zip(key_value, task_kv, strict=True)]
        return plain(query, *key_value, **options)

    patch.setattr(F, "scaled_dot_product_attention", attend)
    handles.append(block.register_forward_pre_hook(lambda *args: inside.append(1)))
    handles.append(block.register_forward_hook(lambda *args: inside.pop() and None))
    return handles


class InlineBlock(nn.Module):
    """No module of its own for the attention, and one head."""

    def __init__(self, *args):
        super().__init__()
        self.norm, self.q, self.k, self.v, self.out = nn.LayerNorm(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, extra=None):
        n, y = x.shape[1], self.norm(x if extra is None else torch.cat([x, extra], 1))
        scores = torch.bmm(self.q(y[:, :n]), self.k(y).mT) / WIDTH**0.5
        return x + self.out(torch.bmm(scores.softmax(-1), self.v(y)))


def test_a_block_may_be_its_own_attention():
    torch.manual_seed(0)
    net = nn.Sequential(*[InlineBlock() for _ in range(3)]).double()
    plan = dict.fromkeys("012", WIDTH)
    x = torch.randn(4, TOKENS, WIDTH).double()
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, *PLAN, plan))
    added = moved(net)
    with dtme.tasks(net, TASKS):
        got = dtme.split(net(x), TASKS)
    dtme.collapse(net)
    for task in TASKS:
        torch.testing.assert_close(got[task], alone(net, added, x, task))


def with_raw_scores(self, q, k, v, mask):
    scores = q @ k.transpose(-2, -1) * self.scale
    raw = scores
    return merged(self.drop(scores.softmax(-1)) @ v), raw


def with_weights(self, q, k, v, mask):
    weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
    return merged(weights @ v), weights


def by_the_package(self, q, k, v, mask):
    out, scores = dtme.attention(q, k, v, scale=self.scale, return_scores=True)
    return merged(out), scores


class Mapped(Attention):
    def forward(self, x, extra=None, mask=None):
        write = self.write
        maps = []

        def keep(*args):
            out, some = write(*args)
            maps.append(some)
            return out

        self.write = keep
        try:
            return super().forward(x, extra, mask), maps[0]
        finally:
            self.write = write


class Maps(Block):
    """What comes out depends on the maps of its own tokens."""

    def forward(self, x, extra=None):
        n = x.shape[1]
        out, maps = self.attn(self.norm1(x), *([] if extra is None else [self.norm1(extra)]))
        x = x + out
        return x + self.mlp(self.norm2(x)) + maps[:, :, 0, :n].mean(1).unsqueeze(-1)


@pytest.mark.parametrize("write", [with_raw_scores, with_weights, by_the_package])
def test_maps_of_the_shared_keys_are_those_of_concatenation(write):
    net = of_blocks(lambda: Mapped(write), Maps)
    check_against_concatenation(net, torch.randn(4, TOKENS, WIDTH).double(), oracle=alone)


class NormTwice(Block):
    """What feeds its attention is two norms: the block as a whole makes keys and values of task tokens."""

    def __init__(self):
        super().__init__(Attention(timm_like))

    def forward(self, x, extra=None):
        norm = lambda y: self.norm1(self.norm2(y))  # noqa: E731
        x = x + self.attn(norm(x), *([] if extra is None else [norm(extra)]))
        return x + self.mlp(x)


class ToFirst(Block):
    """Attention of the first token to all, as in class attention."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.q, self.kv, self.attn = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Identity()

    def forward(self, x, extra=None):
        y = self.norm1(x if extra is None else torch.cat([x, extra], 1))
        k, v = self.kv(y).chunk(2, -1)
        first = F.scaled_dot_product_attention(self.q(y[:, :1])[:, None], k[:, None], v[:, None])[:, 0]
        x = torch.cat([x[:, :1] + first, x[:, 1:]], 1)
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("make", [NormTwice, ToFirst])
def test_whatever_makes_the_keys_of_single_tokens_will_do(make):
    torch.manual_seed(0)
    net = nn.Sequential(make(), make(), make()).double().eval()
    check_against_concatenation(net, torch.randn(4, TOKENS, WIDTH).double())


@pytest.mark.parametrize("value", [-10.0, -1e4, torch.finfo(torch.float64).min, -torch.inf])
def test_a_mask_that_puts_numbers_in_the_place_of_scores_is_exact(value):
    hidden = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.4
    hidden[2] = value != -torch.inf  # a query that sees nothing

    def masked(self, q, k, v, mask):
        seen = F.pad(hidden.clone().fill_diagonal_(False) if value == -torch.inf else hidden, (0, k.shape[-2] - TOKENS))
        return merged((q @ k.mT * self.scale).masked_fill(seen, value).softmax(-1) @ v)

    net = of_blocks(lambda: Attention(masked, table=True))  # the table says of how many tokens
    check_against_concatenation(net, torch.randn(4, TOKENS, WIDTH).double())
