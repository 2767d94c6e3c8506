"""Task tokens in attention that is written out, in every way that people write it, against concatenation."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtme
from dtme.block.site import find_attention
from dtme.seams import plain_attention

WIDTH, HEADS, TOKENS = 12, 3, 9
TASKS = ("a", "b", "c")
PLAN = ({"1": TASKS, "2": ("b",)}, {"0": ("a",), "1": ("b", "c"), "2": TASKS})


def merged(x):
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """``write`` makes (B, H, N, d) of queries, keys and values; ``extra`` tokens (B, t, p) are the oracle's alone."""

    def __init__(self, write, *, bias=True, norm=False, key_heads=HEADS, table=False):
        super().__init__()
        d = WIDTH // HEADS
        self.write, self.scale, self.num_heads = write, d**-0.5, HEADS
        self.q = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.kv = nn.Linear(WIDTH, 2 * key_heads * d, bias=bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(d) if norm else nn.Identity() for _ in range(2))
        self.drop, self.softmax, self.proj = nn.Dropout(0.0), nn.Softmax(dim=-1), nn.Linear(WIDTH, WIDTH)
        self.logit_scale = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        if table:
            self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def forward(self, x, extra=None, mask=None):
        y = x if extra is None else torch.cat([x, extra], 1)
        q = self.q_norm(self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2))
        k, v = self.kv(y).unflatten(-1, (2, -1, WIDTH // HEADS)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.write(self, q, self.k_norm(k), v, mask))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, extra=None):
        x = x + self.attn(self.norm1(x), *([] if extra is None else [self.norm1(extra)]))
        return x + self.mlp(self.norm2(x))


def timm_like(self, q, k, v, mask):
    return merged(self.drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)) @ v)


def scaled_first(self, q, k, v, mask):
    return merged(torch.matmul(self.softmax(torch.matmul(q * self.scale, k.mT)), v))


def widened(self, q, k, v, mask):
    weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1]), dim=-1, dtype=torch.float64)
    return merged(F.dropout(weights.to(v.dtype), 0.5, training=False) @ v).contiguous()


def in_place(self, q, k, v, mask):
    scores = q @ k.mT
    scores *= self.scale
    scores.mul_(self.logit_scale)
    return merged(self.softmax(scores).matmul(v))


def by_einsum(self, q, k, v, mask):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
    return torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2)


def by_einsum_over_places(self, q, k, v, mask):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(torch.einsum("...nhd,...mhd->...hnm", q * self.scale, k), -1)
    return torch.einsum("b h n m, b m h d -> b n h d", [weights, v]).flatten(2)


def heads_in_the_batch(self, q, k, v, mask):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    weights = torch.bmm(q, k.transpose(1, 2)).mul(self.scale).softmax(-1)
    return merged(torch.bmm(weights, v).unflatten(0, (-1, HEADS)))


def added_product(self, q, k, v, mask):
    bias = F.pad(self.table, (0, k.shape[-2] - TOKENS)).repeat(len(q), 1, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=self.scale)
    return merged((scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, (-1, HEADS)))


def stabilised(self, q, k, v, mask):
    scores = q @ k.mT * self.scale
    scores = scores - scores.max(dim=-1, keepdim=True)[0]
    return merged(scores.softmax(-1) @ v)


def with_table(self, q, k, v, mask):
    scores = q @ k.mT * self.scale + F.pad(self.table, (0, k.shape[-2] - TOKENS)).unsqueeze(0)
    return merged(scores.softmax(-1) @ v)


def learned_scale(self, q, k, v, mask):
    return merged(((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * self.logit_scale.exp()).softmax(-1) @ v)


def one_key_head(self, q, k, v, mask):
    return merged((q @ k.mT * self.scale).softmax(-1) @ v)


def causal(self, q, k, v, mask):
    seen = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
    seen = F.pad(seen, (0, k.shape[-2] - q.shape[-2]), value=True)
    return merged((q @ k.mT * self.scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v)


def causal_by_where(self, q, k, v, mask):
    seen = F.pad(torch.ones(q.shape[-2], q.shape[-2]).tril(), (0, k.shape[-2] - q.shape[-2]), value=1.0)
    scores = torch.where(seen.bool(), q @ k.mT * self.scale, torch.finfo(q.dtype).min)
    return merged(scores.softmax(-1) @ v)


def through_attention(self, q, k, v, mask):
    return merged(dtme.attention(q, k, v, scale=self.scale))


WRITTEN = {
    "timm": partial(Attention, timm_like),
    "timm, no bias": partial(Attention, timm_like, bias=False),
    "normed queries and keys": partial(Attention, timm_like, norm=True),
    "scaled queries": partial(Attention, scaled_first),
    "eager": partial(Attention, widened),
    "in place": partial(Attention, in_place),
    "einsum": partial(Attention, by_einsum),
    "einsum, heads behind places": partial(Attention, by_einsum_over_places),
    "heads in the batch": partial(Attention, heads_in_the_batch),
    "baddbmm": partial(Attention, added_product, table=True),
    "less the maximum": partial(Attention, stabilised),
    "relative bias": partial(Attention, with_table, table=True),
    "cosines": partial(Attention, learned_scale),
    "one head of keys": partial(Attention, one_key_head, key_heads=1),
    "causal": partial(Attention, causal),
    "causal, by where": partial(Attention, causal_by_where),
    "dtme.attention": partial(Attention, through_attention),
}


def of_blocks(make_attention, block=Block):
    torch.manual_seed(0)
    return nn.Sequential(*[block(make_attention()) for _ in range(3)]).double().eval()


def moved(net):
    """What expand added, away from the identity."""
    added = {name: p for name, p in net.named_parameters() if ".dtme." in name}
    for parameter in added.values():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    return added


def alone(net, added, x, task):
    for name, block in net.named_children():
        x = x * added.get(f"{name}.dtme.weight.{task}", 1.0) + added.get(f"{name}.dtme.bias.{task}", 0.0)
        tokens = added.get(f"{name}.dtme.tokens.{task}")
        x = block(x, None if tokens is None else tokens.expand(len(x), -1, -1))
    return x


def check_against_concatenation(net, x, plan=PLAN, oracle=alone):
    """Outputs of all tasks, and the gradients of everything that trains."""
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, *plan))
    added = moved(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    with dtme.tasks(net, TASKS):
        got = dtme.split(net(x), TASKS)
    loss = sum((i + 1) * y.square().sum() for i, y in enumerate(got.values()))
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    assert dtme.sharing_of(net) == "shared prefix"
    dtme.collapse(net)
    want = {task: oracle(net, added, x, task) for task in TASKS}
    loss = sum((i + 1) * y.square().sum() for i, y in enumerate(want.values()))
    expected = torch.autograd.grad(loss, trained, allow_unused=True)
    for task in TASKS:
        torch.testing.assert_close(got[task], want[task], rtol=0, atol=1e-10)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10 * theirs.abs().max().item() + 1e-12)


@pytest.mark.parametrize("kind", WRITTEN)
def test_it_equals_concatenation(kind):
    check_against_concatenation(of_blocks(WRITTEN[kind]), torch.randn(4, TOKENS, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["timm", "einsum, heads behind places", "less the maximum", "causal, by where"])
def test_it_compiles_in_one_graph(kind):
    torch._dynamo.reset()
    net = of_blocks(WRITTEN[kind])
    site = find_attention("0", net[0], WIDTH)
    x, tokens = (torch.randn(rows, TOKENS, WIDTH, dtype=torch.float64) for rows in (4, 2))
    run, keys_values = (
        torch.compile(function, fullgraph=True, backend="eager")
        for function in (partial(site.seam.run, plain_attention), site.seam.keys_values)
    )
    torch.testing.assert_close(run(x), net[0].attn(x))
    torch.testing.assert_close(keys_values(tokens), site.seam.keys_values(tokens))


# --- dtme.attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_heads", [HEADS, 1])
@pytest.mark.parametrize("mask", ["none", "bool", "additive", "causal"])
def test_attention_is_plain_attention_outside_of_expanded_blocks(mask, key_heads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 4).double() for heads in (HEADS, key_heads, key_heads))
    seen = torch.rand(2, 1, 5, 5) > 0.3
    seen |= torch.eye(5, dtype=torch.bool)
    options = {"bool": {"attn_mask": seen}, "additive": {"attn_mask": torch.randn(HEADS, 5, 5).double()}}.get(mask, {})
    options |= {"is_causal": mask == "causal", "scale": 0.7}
    out, scores = dtme.attention(q, k, v, **options, return_scores=True)
    key, value = (x.repeat_interleave(HEADS // key_heads, 1) for x in (k, v))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, key, value, **options))
    torch.testing.assert_close(out, dtme.attention(q, k, v, **options))
    torch.testing.assert_close(scores.softmax(-1) @ value, out)
    assert scores.shape == (2, HEADS, 5, 5) and (mask in ("none", "additive")) == bool(scores.isfinite().all())


@pytest.mark.parametrize(
    ("shapes", "options", "says"),
    [
        ([(5, 4)] * 3, {}, r"query must be \(B, H, N, d\), got \(5, 4\)"),
        ([(1, 3, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)], {}, r"divide those of query, got \[3, 2, 2\]"),
        ([(1, 2, 5, 4)] * 3, {"is_causal": True, "attn_mask": torch.zeros(5, 5)}, "is_causal must be False"),
    ],
)
def test_bad_arguments_of_attention_say_what_is_wrong(shapes, options, says):
    with pytest.raises(ValueError, match=says):
        dtme.attention(*(torch.zeros(shape) for shape in shapes), **options)


def test_attention_in_an_expanded_block_compiles_and_keeps_its_scores():
    torch._dynamo.reset()

    def scoring(self, q, k, v, mask):
        out, scores = dtme.attention(q, k, v, scale=self.scale, return_scores=True)
        return merged(out) + scores[..., 0].mean(1).unsqueeze(-1)  # of the first key, whatever else is attended to

    net, x = of_blocks(partial(Attention, scoring)), torch.randn(4, TOKENS, WIDTH, dtype=torch.float64)
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 2, *PLAN))
    moved(net)
    model = dtme.MultiTaskModel(net, {task: nn.Identity() for task in TASKS})
    want = model(x)
    got = torch.compile(model, fullgraph=True, backend="eager")(x)
    for task in TASKS:
        torch.testing.assert_close(got[task], want[task])
