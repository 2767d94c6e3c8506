"""Expanded attention against softmax written out in NumPy, and the whole block against real concatenation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtme_kernels import expanded_attention
from dtme_kernels.attention import op, reference
from dtme_kernels.attention.arguments import Attention
from dtme_kernels.testing import DTYPES, LAYOUTS, LOW_PRECISION, assert_accurate, exact, make


def problem(lead=(3, 2), heads=2, key_heads=2, queries=5, keys=5, t=2, d=4, dtype=torch.float32, grad=False):
    """query, key, value, task_key, task_value."""
    shared = [(*lead, heads, queries, d), *[(*lead, key_heads, keys, d)] * 2]
    task = [(*lead[:-1], key_heads, t, d)] * 2
    return [make(*shape, dtype=dtype, seed=s, requires_grad=grad) for s, shape in enumerate(shared + task)]


def masks(*shape, dtype=torch.float32):
    """Bool and additive masks that broadcast to (T, B, H, N, S), no row of them all hidden."""
    visible = make(*shape, seed=7) > 0
    return visible, torch.where(visible, make(*shape, seed=8, dtype=dtype), -math.inf).to(dtype)


def concatenated(query, key, value, task_key, task_value, attn_mask=None, is_causal=False, scale=None):
    """key, value and an additive mask over both kinds of keys, in NumPy's float64, with as many heads as query."""
    q, k, v, tk, tv = exact(query, key, value, task_key, task_value)
    groups = q.shape[-3] // k.shape[-3]
    k, v = (
        np.concatenate([x, np.broadcast_to(y[..., None, :, :, :], (*x.shape[:-2], *y.shape[-2:]))], -2).repeat(
            groups, -3
        )
        for x, y in ((k, tk), (v, tv))
    )
    bias = np.zeros((*q.shape[:-1], k.shape[-2]))
    num_keys = key.shape[-2]
    if is_causal:
        bias[..., :num_keys] += np.where(np.arange(num_keys) <= np.arange(q.shape[-2])[:, None], 0, -np.inf)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        bias[..., :num_keys] += np.where(attn_mask.cpu().numpy(), 0, -np.inf)
    elif attn_mask is not None:
        bias[..., :num_keys] += exact(attn_mask)[0]
    return q * (q.shape[-1] ** -0.5 if scale is None else scale), k, v, bias


def oracle(*args, **options):
    q, k, v, bias = concatenated(*args, **options)
    scores = scores_of(q, k, bias)
    p = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e300))
    return p / p.sum(-1, keepdims=True) @ v


def scores_of(q, k, bias):
    return q @ np.swapaxes(k, -1, -2) + bias


def condition(want, *args, **options):
    """How much more than relatively to the result a rounding can show: scores become exponents, and values cancel."""
    q, k, _, bias = concatenated(*args, **options)
    scores, (value,) = scores_of(q, k, bias), exact(args[2])
    size = abs(want).max(initial=0)
    return abs(scores[np.isfinite(scores)]).max(initial=1) * (abs(value).max(initial=0) / size if size else 1)


def plain(*args, **options):
    q, k, v, bias = (torch.from_numpy(x).to(args[0].dtype) for x in concatenated(*args, **options))
    return F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)


def gradients(impl, args, options):
    """Of the five tensors, and of a mask that wants one; "concatenated": plain torch's own."""
    out = joined(*args, **options) if impl == "concatenated" else expanded_attention(*args, impl=impl, **options)
    leaves = [*args, *(x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
    return torch.autograd.grad((out * make(*out.shape, dtype=out.dtype, seed=9)).sum(), leaves)


def check_gradients(impl, args, options):
    """Against the reference in float64, held to twice the error of plain torch."""

    def wide(x):
        floats = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.detach().double().requires_grad_(x.requires_grad) if floats else x

    want = gradients("reference", [wide(x) for x in args], {name: wide(x) for name, x in options.items()})
    plainly = gradients("concatenated", args, options)
    for got, exactly, by_torch in zip(gradients(impl, args, options), want, plainly, strict=True):
        assert got.dtype == args[0].dtype
        # low precision rounds once, float32 at every addition
        terms = args[1].shape[-2] + 64 if got.dtype == torch.float32 else 1
        assert_accurate(got, exactly.cpu(), by_torch, terms)


def joined(query, key, value, task_key, task_value, attn_mask=None, is_causal=False, scale=None):
    """scaled_dot_product_attention over the concatenated keys."""
    groups, (num_queries, num_keys) = query.shape[-3] // key.shape[-3], (query.shape[-2], key.shape[-2])
    key, value = (
        torch.cat([x, y.unsqueeze(-4).expand(*x.shape[:-2], *y.shape[-2:])], -2).repeat_interleave(groups, -3)
        for x, y in ((key, task_key), (value, task_value))
    )
    if is_causal:
        attn_mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril()
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], num_keys)
        attn_mask = F.pad(attn_mask, (0, task_key.shape[-2]), value=attn_mask.dtype == torch.bool)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)


def check(args, impl, **options):
    got = expanded_attention(*args, impl=impl, **options)
    assert got.dtype == args[0].dtype
    assert got.transpose(-3, -2).is_contiguous()
    want = oracle(*args, **options)
    terms = 1  # low precision rounds once, others at every addition
    if got.dtype not in LOW_PRECISION:
        additions = args[0].shape[-1] + args[1].shape[-2] + args[3].shape[-2]
        terms = additions * condition(want, *args, **options) ** 2
    assert_accurate(got, want, plain(*args, **options), terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(3, 2), (1, 1), (4,), (1,)])
@pytest.mark.parametrize("t", [0, 1, 6])
def test_matches_oracle(impl, lead, t, dtype):
    check(problem(lead, t=t, dtype=dtype), impl)


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 6, "key_heads": 2},
        {"heads": 4, "key_heads": 1, "keys": 9},
        {"queries": 1, "keys": 8},
        {"queries": 7, "keys": 3},
        {"keys": 0},
        {"queries": 0},
        {"lead": (2, 0)},
        {"d": 1},
        {"d": 33, "queries": 65, "keys": 130},
    ],
    ids=str,
)
def test_sizes(impl, sizes):
    check(problem(**sizes), impl)
    check(problem(**sizes), impl, scale=0.7)
    check(problem(**sizes), impl, is_causal=True)


@pytest.mark.parametrize(
    "shape", [(5, 5), (5,), (1, 5), (5, 1), (2, 5, 5), (2, 1, 5, 5), (1, 1, 5, 5), (3, 1, 1, 1, 5), (3, 2, 2, 5, 5)]
)
def test_masks_broadcast_from_the_right(impl, shape):
    for mask in masks(*shape):
        check(problem(), impl, attn_mask=mask)
        if len(shape) < 5:
            check(problem((2,)), impl, attn_mask=mask)
            check(problem((2,), heads=4), impl, attn_mask=mask.repeat(2, 1, 1) if len(shape) == 3 else mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_every_dtype(impl, dtype):
    for mask in masks(2, 1, 5, 5, dtype=dtype):
        check(problem(dtype=dtype), impl, attn_mask=mask)


def test_task_keys_are_seen_where_every_shared_key_is_masked(impl):
    args = problem(grad=True)
    for mask in (torch.zeros(5, 5, dtype=torch.bool), torch.full((5, 5), -math.inf)):
        got = expanded_attention(*args, attn_mask=mask, impl=impl)
        alone = F.scaled_dot_product_attention(args[0], *(x.unsqueeze(1).expand(3, 2, 2, 2, 4) for x in args[3:]))
        torch.testing.assert_close(got, alone)
        grads = torch.autograd.grad(got.square().sum(), args)
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[1].any()
        assert not grads[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_row_that_sees_nothing_is_zero(impl, kind, dtype):
    args = problem(t=0, dtype=dtype, grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[3] = False
    if kind == "additive":
        mask = torch.zeros(5, 5, dtype=dtype).masked_fill(~mask, -math.inf)
    got = expanded_attention(*args, attn_mask=mask, impl=impl)
    assert not got[..., 3, :].any()
    grads = torch.autograd.grad(got.square().sum(), args[:3])
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][..., 3, :].any()
    others = [args[0][..., [0, 1, 2, 4], :], *args[1:]]
    got = expanded_attention(*others, attn_mask=mask[[0, 1, 2, 4]], impl=impl)
    for with_it, without in zip(grads[1:], torch.autograd.grad(got.square().sum(), args[1:3]), strict=True):
        torch.testing.assert_close(with_it, without)


def test_nan_spreads_as_in_softmax(impl):
    """A training loop looks for it: a query that is not a number must not come out as one that sees nothing."""
    query, *others = problem()
    query[0, 0, 0, 0, 0] = math.nan
    out = expanded_attention(query, *others, impl=impl)
    assert out[0, 0, 0, 0].isnan().all()
    assert not out[0, 0, 0, 1:].isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lead", [(3, 2), (2,)])
def test_layouts(impl, lead, layout):
    args = [LAYOUTS[layout](x) for x in problem(lead, key_heads=1)]
    check(args, impl, attn_mask=LAYOUTS[layout](make(5, 5)))
    packed = make(3, 2, 5, 3, 2, 4).permute(3, 0, 1, 4, 2, 5)  # as a fused qkv projection leaves it
    check([*packed, *problem()[3:]], impl)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [8, 20, 72])
def test_layouts_that_can_and_cannot_be_read_by_eight_channels(impl, d, layout):
    sizes = {"queries": 9, "keys": 9, "d": d, "dtype": torch.float16}
    args = [LAYOUTS[layout](x) for x in problem(**sizes)]
    check_gradients(impl, [x.detach().requires_grad_() for x in args], {})
    packed = make(3, 2, 9, 3, 2, d, dtype=torch.float16).permute(3, 0, 1, 4, 2, 5)
    check_gradients(impl, [x.detach().requires_grad_() for x in (*packed, *args[3:])], {})


@pytest.mark.parametrize(
    ("keys", "t"), [(0, 16), (64, 6), (69, 6), (74, 6), (75, 6), (90, 6), (91, 6), (63, 1), (96, 0), (97, 0), (127, 33)]
)
def test_last_shared_keys_beside_the_task_keys(impl, keys, t):
    """A tile holds 32, 64 or 128 keys. What is left of the shared ones joins the task keys in a tile of 16 or 32."""
    args = problem((2, 2), 2, 1, 3, keys, t, 8, grad=True)
    check(args, impl)
    check_gradients(impl, args, {})


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_statistics_have_the_promised_shape(impl, kind, dtype):
    args = problem(dtype=dtype)
    mask = MASKS[kind]((3, 2), 2, 5, 5, dtype).get("attn_mask")
    _, statistics = op.expanded_attention(impl, *args, mask, False, None)
    _, promised = op._fake(*args, mask)
    assert statistics.shape == promised.shape == Attention(*args, mask).statistics_shape
    assert statistics.dtype == promised.dtype == torch.float32


@pytest.mark.parametrize("kind", ["none", "additive"])
def test_what_the_forward_left_may_lie_otherwise(impl, kind):
    """As hooks on saved tensors, which move them elsewhere and back, may leave it."""

    def apart(x):
        return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x

    args = problem(grad=True)
    options = MASKS[kind]((3, 2), 2, 5, 5, torch.float32)
    want = gradients(impl, args, options)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, apart):
        got = gradients(impl, args, options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@given(
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    is_causal=st.booleans(),
)
def test_any_shape(lead, key_heads, groups, sizes, dtype, is_causal):
    queries, keys, t, d = sizes
    check(problem(tuple(lead), key_heads * groups, key_heads, queries, keys, t, d, dtype), "auto", is_causal=is_causal)


@pytest.mark.float64
@pytest.mark.parametrize("lead", [(2, 2), (2,)])
@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("shape", [None, (2, 3), (2, 1, 1, 3), (1, 2, 2, 1)])
def test_gradients(impl, lead, key_heads, shape, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 1)  # one image at a time
    args = problem(lead, key_heads=key_heads, queries=2, keys=3, t=1, d=2, dtype=torch.float64, grad=True)
    mask = None if shape is None else make(*shape, dtype=torch.float64, seed=7, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *a: expanded_attention(*a[:5], attn_mask=a[5], scale=0.7, impl=impl), (*args, mask)
    )


@pytest.mark.parametrize("sizes", [{"lead": (2, 0)}, {"lead": (0,)}, {"queries": 0}, {"keys": 0}, {"t": 0}], ids=str)
def test_gradients_of_nothing_are_zero_and_have_their_shapes(impl, sizes):
    args = problem(**sizes, grad=True)
    grads = torch.autograd.grad(expanded_attention(*args, impl=impl).sum(), args)
    assert [x.shape for x in grads] == [x.shape for x in args]
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.float64
@pytest.mark.parametrize("sizes", [{"t": 0}, {"keys": 0}, {"queries": 0}, {"lead": (2, 0)}, {"queries": 3}], ids=str)
def test_gradients_of_a_causal_or_empty_problem(impl, sizes):
    args = problem(**{"d": 2, "keys": 3, "dtype": torch.float64, "grad": True} | sizes)
    assert torch.autograd.gradcheck(lambda *a: expanded_attention(*a, is_causal=True, impl=impl), args)


SIZES = [
    {"heads": 4, "queries": 70, "keys": 70, "t": 3, "d": 32},
    {"lead": (3,), "heads": 3, "key_heads": 3, "queries": 33, "keys": 130, "t": 20, "d": 33},
    {"heads": 2, "key_heads": 1, "queries": 150, "keys": 20, "t": 0, "d": 80},
    {"lead": (1, 2), "queries": 17, "keys": 17, "t": 64, "d": 256},
    {"lead": (2, 1), "heads": 1, "key_heads": 1, "queries": 40, "keys": 70, "t": 17, "d": 128},
    {"queries": 65, "keys": 197, "t": 6, "d": 64},
    {"lead": (1, 2), "queries": 40, "keys": 40, "t": 3, "d": 72},
]
MASKS = {
    "none": lambda *_: {},
    "causal": lambda *_: {"is_causal": True},
    "bool": lambda lead, heads, queries, keys, dtype: {"attn_mask": masks(heads, queries, keys)[0]},
    "additive": lambda lead, heads, queries, keys, dtype: {"attn_mask": masks(queries, keys, dtype=dtype)[1]},
    "padding": lambda lead, heads, queries, keys, dtype: {"attn_mask": masks(*lead[-1:], 1, 1, keys)[0]},
}


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_are_as_right_as_plain_torch(impl, sizes, kind, dtype):
    args = problem(**sizes, dtype=dtype, grad=True)
    query, key = args[:2]
    if impl == "triton" and op.expanded_attention.kernels[impl].cannot_run(*args):
        pytest.skip("more than 64 channels of exact float32 are the reference's")
    options = MASKS[kind](query.shape[:-3], query.shape[-3], query.shape[-2], key.shape[-2], dtype)
    check_gradients(impl, args, options)


@pytest.mark.parametrize("shape", [(20, 30), (1, 30), (2, 1, 20, 30), (4, 20, 1), (3, 1, 1, 20, 30), (3, 2, 4, 20, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_of_an_additive_mask(impl, shape, dtype):
    args = problem(heads=4, queries=20, keys=30, dtype=dtype, grad=True)
    mask = make(*shape, dtype=dtype, seed=7, requires_grad=True)
    check_gradients(impl, args, {"attn_mask": mask})


def test_gradient_of_an_expanded_mask(impl):
    """It has the mask's shape, whatever memory the rows of the mask share."""
    args, mask = problem(), make(2, 5, 5, seed=7)
    mask, own = mask[:1].expand(2, 5, 5).requires_grad_(), mask[:1].repeat(2, 1, 1).requires_grad_()
    got, want = (
        torch.autograd.grad(expanded_attention(*args, attn_mask=x, impl=impl).square().sum(), x)[0] for x in (mask, own)
    )
    torch.testing.assert_close(got, want)


def test_only_the_mask_wants_a_gradient(impl):
    args, mask = problem(), make(5, 5, seed=7, requires_grad=True)
    (got,) = torch.autograd.grad(expanded_attention(*args, attn_mask=mask, impl=impl).square().sum(), mask)
    (want,) = torch.autograd.grad(joined(*args, attn_mask=mask).square().sum(), mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_lowest_finite_mask_hides_only_beside_others(impl, dtype):
    """transformers' masks are finite: where they hide everything, everything is seen alike."""
    for t in (0, 2):
        args = problem(t=t, dtype=dtype)
        mask = torch.full((5, 5), torch.finfo(dtype).min, dtype=dtype)
        mask[:2] = 0
        got = expanded_attention(*args, attn_mask=mask, impl=impl)
        torch.testing.assert_close(got, joined(*args, attn_mask=mask), rtol=1e-2, atol=2e-3)
        if impl not in ("triton", "cpp"):
            continue  # torch's fast attention, on the CPU, has the gradients of probabilities of 1 here
        wide = [x.double().requires_grad_() for x in args]
        with sdpa_kernel(SDPBackend.MATH):
            want = gradients("concatenated", wide, {"attn_mask": mask.double()})
        got = gradients(impl, [x.requires_grad_() for x in args], {"attn_mask": mask})
        for x, exactly in zip(got, want, strict=True):
            torch.testing.assert_close(x.double(), exactly, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("kind", ["none", "causal", "additive"])
def test_scales_that_are_not_positive(impl, scale, kind):
    args = problem(grad=True)
    options = MASKS[kind]((3, 2), 2, 5, 5, torch.float32) | {"scale": scale}
    check(args, impl, **options)
    for got, want in zip(gradients(impl, args, options), gradients("concatenated", args, options), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_dropout(impl):
    args = problem(t=3, grad=True)
    torch.manual_seed(0)
    got = expanded_attention(*args, dropout_p=0.5, impl=impl)
    torch.manual_seed(0)
    assert torch.equal(got, expanded_attention(*args, dropout_p=0.5, impl=impl))
    assert not torch.allclose(got, expanded_attention(*args, impl=impl))
    assert all(x.isfinite().all() for x in torch.autograd.grad(got.sum(), args))
    ones = [torch.ones_like(x) for x in problem(keys=2000, t=2000)]  # kept probabilities are scaled by 1 / (1 - p)
    assert abs(expanded_attention(*ones, dropout_p=0.5, impl=impl).mean() - 1) < 0.02


Q, K, V, TK, TV = problem()
MANY_KEY_HEADS = {"key": K.repeat(1, 1, 2, 1, 1), "value": V.repeat(1, 1, 2, 1, 1)}
MANY_KEY_HEADS |= {"task_key": TK.repeat(1, 2, 1, 1), "task_value": TV.repeat(1, 2, 1, 1)}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
        ({"value": V.long()}, TypeError, "value must be float16.*got torch.int64"),
        ({"key": K.double()}, TypeError, "key must be torch.float32 like query, got torch.float64"),
        ({"task_value": TV.to("meta")}, ValueError, "task_value must be on cpu like query, got meta"),
        ({"query": Q[0, 0]}, ValueError, r"query must be \(B, H, N, d\) or \(T, B, H, N, d\)"),
        ({"key": K[0]}, ValueError, r"key must be \(T, B, G, S, d\) with T = 3"),
        ({"key": K[:, :1]}, ValueError, r"key must be .* = \(3, 2, 2, 5, 4\), got \(3, 1, 2, 5, 4\)"),
        ({"key": K[..., :3]}, ValueError, r"key must be .* = \(3, 2, 2, 5, 4\), got \(3, 2, 2, 5, 3\)"),
        ({"value": V[..., :4, :]}, ValueError, r"value must be .* = \(3, 2, 2, 5, 4\), got \(3, 2, 2, 4, 4\)"),
        ({"key": K.repeat(1, 1, 2, 1, 1)}, ValueError, r"value must be \(T, B, G, S, d\) = .*got"),
        (MANY_KEY_HEADS, ValueError, "key heads must divide the 2 heads of query, got 4"),
        ({"task_key": TK[0]}, ValueError, r"task_key must be \(T, G, t, d\)"),
        ({"task_key": TK[:2]}, ValueError, r"task_key must be .* = \(3, 2, 2, 4\), got \(2, 2, 2, 4\)"),
        ({"task_key": TK[:, :1]}, ValueError, r"task_key must be .* = \(3, 2, 2, 4\), got \(3, 1, 2, 4\)"),
        ({"task_value": TV[:, :, :1]}, ValueError, r"task_value must be .* = \(3, 2, 2, 4\), got \(3, 2, 1, 4\)"),
        ({"attn_mask": [1]}, TypeError, "attn_mask must be a tensor, got list"),
        ({"attn_mask": torch.ones(5, 5).int()}, TypeError, "attn_mask must be bool or floating point"),
        ({"attn_mask": torch.ones(5, 7)}, ValueError, r"attn_mask must broadcast to \(3, 2, 2, 5, 5\), got \(5, 7\)"),
        ({"attn_mask": torch.ones(3, 1, 5, 5)}, ValueError, "attn_mask must broadcast"),
        ({"attn_mask": torch.ones(5, 5, device="meta")}, ValueError, "attn_mask must be on cpu like query, got meta"),
        ({"attn_mask": torch.ones(5, 5), "is_causal": True}, ValueError, "is_causal must be False with an attn_mask"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_attention(change, error, says):
    args = {"query": Q, "key": K, "value": V, "task_key": TK, "task_value": TV} | change
    with pytest.raises(error, match=says):
        expanded_attention(**args)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"scale": "x"}, TypeError),
        ({"scale": -math.inf}, ValueError),
        ({"dropout_p": "x"}, TypeError),
        ({"dropout_p": 1.0}, ValueError),
    ],
)
def test_numbers_are_numbers(change, error):
    shared, task = [torch.randn(2, 3, 4, 5, 8) for _ in range(3)], [torch.randn(2, 4, 2, 8) for _ in range(2)]
    with pytest.raises(error, match=next(iter(change))):
        expanded_attention(*shared, *task, **change)


def test_reference_compiles_with_dynamic_shapes():
    shared, task = [torch.randn(2, 3, 4, 5, 8) for _ in range(3)], [torch.randn(2, 4, 2, 8) for _ in range(2)]

    def run(*tensors):
        return expanded_attention(*tensors, impl="reference")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*shared, *task), run(*shared, *task))
