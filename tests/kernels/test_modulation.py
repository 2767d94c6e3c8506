"""Modulation and its layer norm against NumPy in float64."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dtme_kernels import launch, modulate, modulate_layer_norm
from dtme_kernels.registry import OPERATORS
from dtme_kernels.testing import DTYPES, LAYOUTS, LOW_PRECISION, assert_accurate, exact, make

EPS = 1e-6
SHAPES = [(2, 5, 33), (3, 2, 5, 8), (1, 1, 1), (3, 0, 4, 6), (2, 0, 7), (4, 1, 5)]


def problem(*shape, num_streams=3, dtype=torch.float32, layout="contiguous", parameters=None, grad=False):
    """tokens, weight, bias, norm_weight, norm_bias."""
    p, parameters = shape[-1], parameters or dtype
    tokens = make(*shape, dtype=dtype, layout=layout, requires_grad=grad)
    streams = (make(num_streams, p, dtype=parameters, seed=s, requires_grad=grad) for s in (1, 2))
    return tokens, *streams, *(make(p, dtype=parameters, seed=s, requires_grad=grad) for s in (3, 4))


def oracle(tokens, weight, bias, norm_weight, norm_bias):
    x, w, b, g, c = exact(tokens, weight, bias, norm_weight, norm_bias)
    y = w[:, None, None] * x + b[:, None, None]
    variance = ((y - y.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True)
    return y, (y - y.mean(-1, keepdims=True)) / np.sqrt(variance + EPS) * g + c


def plain(tokens, weight, bias, norm_weight, norm_bias):
    """As one would write it, parameters cast to the tokens' dtype."""
    w, b, *norm = (x.to(tokens.dtype) for x in (weight, bias, norm_weight, norm_bias))
    y = tokens * w[:, None, None] + b[:, None, None]
    return y, F.layer_norm(y, y.shape[-1:], *norm, EPS)


def condition(y):
    """What the norm makes of an error of y: the largest |y| / std of a row."""
    return float((abs(y) / np.sqrt(y.var(-1, keepdims=True) + EPS)).max(initial=1))


def check(args, impl):
    modulated = modulate(*args[:3], impl=impl)
    pair = modulate_layer_norm(*args, EPS, impl=impl)
    assert torch.equal(modulated, pair[0])
    expected = oracle(*args)
    terms = (1, condition(expected[0]) ** 2)
    for got, want, by_torch, n in zip(pair, expected, plain(*args), terms, strict=True):
        assert got.dtype == args[0].dtype
        assert got.is_contiguous()
        assert_accurate(got, want, by_torch, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_oracle(impl, shape, dtype):
    check(problem(*shape, num_streams=3 if len(shape) == 3 else shape[0], dtype=dtype), impl)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 9), (3, 2, 5, 9)])
def test_layouts(impl, shape, layout):
    args = [LAYOUTS[layout](x) if x.dim() > 1 else x for x in problem(*shape)]
    check(args, impl)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_tokens_with_float32_parameters(impl, dtype):
    check(problem(2, 5, 16, dtype=dtype, parameters=torch.float32), impl)


@given(
    shared=st.booleans(),
    sizes=st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 5), st.integers(1, 40)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shared, sizes, layout, dtype):
    num_streams, *shape = sizes
    shape = shape if shared else sizes
    check(problem(*shape, num_streams=num_streams, layout=layout, dtype=dtype), "auto")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_identity_is_exact(impl, dtype):
    tokens = make(2, 5, 8, dtype=dtype, layout="transposed")
    got = modulate(tokens, torch.ones(3, 8), torch.zeros(3, 8), impl=impl)
    assert torch.equal(got, tokens.expand(3, 2, 5, 8))


def test_a_large_mean_does_not_eat_the_variance(impl):
    tokens, *parameters = problem(2, 50, 192)
    tokens = tokens + 1000  # E[y^2] - E[y]^2 would be wrong in the second digit
    args = (tokens, torch.ones(1, 192), torch.zeros(1, 192), *parameters[2:])
    got, want = modulate_layer_norm(*args, EPS, impl=impl)[1], oracle(*args)[1]
    assert_accurate(got, want, plain(*args)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [192, 321, 384, 768, 1024, 1280, 4096])
def test_widths_of_one_piece_and_of_several(impl, p, dtype):
    """A kernel takes a row in pieces of a power of two; the last may be full or not."""
    args = problem(1, 3, p, num_streams=2, dtype=dtype, parameters=torch.float32, grad=True)
    check([x.detach() for x in args], impl)
    check_gradients(args, [make(2, 1, 3, p, dtype=dtype, seed=s) for s in (5, 6)], impl)


@pytest.mark.parametrize("shape", [(2, 5, 33), (3, 2, 5, 8)])
def test_statistics_are_right_or_left_to_the_backward(impl, shape):
    """Mean and 1 / std of every row and stream, where a kernel's own backward wants them; else zeros or -inf."""
    args = problem(*shape)
    y = oracle(*args)[0]
    modulated, _, statistics = OPERATORS["modulate_layer_norm"](impl, *args, EPS)
    assert statistics.shape == (2, *modulated.shape[:-1])
    assert statistics.dtype == torch.float32
    if impl == "triton" or not (statistics == 0).all() | statistics.isneginf().all():
        want = np.stack([y.mean(-1), 1 / np.sqrt(y.var(-1) + EPS)])
        assert_accurate(statistics, want, torch.from_numpy(want), terms=shape[-1])


def test_the_sums_of_all_streams_in_one_reduction(impl, monkeypatch):
    """As a GPU has it; in Triton's interpreter every sum is otherwise taken by itself."""
    if impl != "triton" or not launch.interpreted():
        pytest.skip("of the interpreter")
    import triton.language as tl

    from dtme_kernels.modulation import pieces

    monkeypatch.setattr(pieces, "JOINT", tl.constexpr(True))
    args = problem(2, 3, 33, grad=True)
    check([x.detach() for x in args], impl)
    check_gradients(args, [make(3, 2, 3, 33, seed=s) for s in (5, 6)], impl)


@pytest.mark.skipif(OPERATORS["modulate_layer_norm"].automatic("cpu") != "cpp", reason="no C++ kernels")
@pytest.mark.parametrize("p", [2, 3, 7, 192])
def test_what_rounding_takes_from_the_mean_is_not_lost(p):
    tokens, *_, norm_weight, norm_bias = problem(50, 2, p)
    args = (tokens / 100 + 1000, torch.ones(1, p), torch.zeros(1, p), norm_weight, norm_bias)
    want = oracle(*args)[1]  # of tokens float32 holds exactly
    assert_accurate(modulate_layer_norm(*args, EPS, impl="cpp")[1], want, torch.from_numpy(want), terms=16)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_the_norm_is_taken_before_rounding(impl, dtype):
    tokens, weight, bias, *norm = problem(2, 50, 16, dtype=dtype, parameters=torch.float32)
    args = (tokens, weight, bias + 100, *norm)  # steps of 0.5 in bfloat16, a good part of the standard deviation
    got, want = modulate_layer_norm(*args, EPS, impl=impl)[1], oracle(*args)[1]
    assert_accurate(got, want, torch.from_numpy(want))


@pytest.mark.float64
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"expanded"}))
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 2, 3, 5)])
def test_gradients(impl, shape, layout):
    args = problem(*shape, dtype=torch.float64, layout=layout, grad=True)
    assert torch.autograd.gradcheck(lambda *a: modulate(*a, impl=impl), args[:3])
    assert torch.autograd.gradcheck(lambda *a: modulate_layer_norm(*a, impl=impl), args)


def gradients(function, args, weights):
    """Of sums of the outputs, weighted."""
    outputs = function(*args)
    return torch.autograd.grad(sum((a * b.to(a.dtype)).sum() for a, b in zip(outputs, weights, strict=True)), args)


def check_gradients(args, weights, impl):
    ours, wide = partial(modulate_layer_norm, impl=impl), [x.detach().double().requires_grad_() for x in args]
    got, want, by_torch = (gradients(f, x, weights) for f, x in ((ours, args), (plain, wide), (plain, args)))
    for leaf, a, b, c in zip(args, got, want, by_torch, strict=True):
        assert a.dtype == leaf.dtype
        assert_accurate(a, b.cpu(), c)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize(
    ("shape", "num_streams"),
    [((4, 50, 16), 3), ((3, 4, 50, 16), 3), ((2, 3, 33), 1), ((1, 3, 600), 11), ((2, 1, 2049), 4)],
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_gradients_are_as_right_as_plain_torch(impl, shape, num_streams, layout, dtype):
    args = problem(*shape, num_streams=num_streams, dtype=dtype, layout=layout, parameters=torch.float32, grad=True)
    weights = [make(num_streams, *shape[-3:], dtype=dtype, seed=s, layout=layout) for s in (5, 6)]
    check_gradients(args, weights, impl)


def test_gradients_of_a_large_mean(impl):
    tokens, _, _, *norm = problem(2, 20, 192, num_streams=1)
    args = [tokens + 1000, torch.ones(1, 192), torch.zeros(1, 192), *norm]
    args = [x.detach().requires_grad_() for x in args]
    check_gradients(args, [make(1, 2, 20, 192, seed=s) for s in (5, 6)], impl)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("shape", [(4, 50, 16), (3, 4, 50, 16)])
def test_gradients_without_a_norm_are_as_right_as_plain_torch(impl, shape, dtype):
    args, weights = problem(*shape, dtype=dtype, parameters=torch.float32, grad=True)[:3], [make(3, 4, 50, 16, seed=5)]

    def by_torch(tokens, weight, bias):
        return (tokens * weight.to(tokens.dtype)[:, None, None] + bias.to(tokens.dtype)[:, None, None],)

    got = gradients(lambda *a: (modulate(*a, impl=impl),), args, weights)
    want = gradients(by_torch, [x.detach().double().requires_grad_() for x in args], weights)
    for a, b, c in zip(got, want, gradients(by_torch, args, weights), strict=True):
        assert_accurate(a, b.cpu(), c)


@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 2, 0, 8)])
def test_gradients_of_no_tokens_are_zero(impl, shape):
    args = problem(*shape, grad=True)
    sum(x.sum() for x in modulate_layer_norm(*args, impl=impl)).backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in args)


def test_streams_of_expanded_tokens_have_gradients_of_their_own(impl):
    """Streams that share their memory are still streams: (T, B, N, p), whatever the stride of T."""
    tokens, weight, bias = problem(2, 5, 8)[:3]
    leaf = tokens.expand(3, -1, -1, -1).requires_grad_()
    up = make(3, 2, 5, 8, seed=5)
    (grad,) = torch.autograd.grad(modulate(leaf, weight, bias, impl=impl), leaf, up)
    torch.testing.assert_close(grad, up * weight[:, None, None])


def test_a_constant_bias_and_no_eps(impl):
    """Beyond the last row of a tile, and the last channel, everything is 0, and 0 times 1 / std(0) is not."""
    args = [make(2, 5, 24), torch.ones(1, 24), torch.zeros(1, 24), torch.ones(24), torch.zeros(24)]
    args = [x.requires_grad_() for x in args]
    sum(x.square().sum() for x in modulate_layer_norm(*args, 0.0, impl=impl)).backward()
    assert all(x.grad.isfinite().all() for x in args)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_parameter_gradients_are_summed_in_float32(impl, dtype):
    """4096 ones and then some: neither half type counts that far in steps of one."""
    tokens = torch.ones(4, 2049, 1, dtype=dtype)
    weight, bias = (torch.ones(2, 1, requires_grad=True) for _ in range(2))
    modulate(tokens, weight, bias, impl=impl).sum(dtype=torch.float32).backward()
    assert weight.grad.tolist() == bias.grad.tolist() == [[8196.0]] * 2


@pytest.mark.float64
def test_only_one_output_used(impl):
    args = problem(2, 3, 5, dtype=torch.float64, grad=True)
    for output in range(2):
        assert torch.autograd.gradcheck(lambda *a, i=output: modulate_layer_norm(*a, impl=impl)[i], args)


X, W, V = make(2, 5, 6), make(3, 6), make(6)


@pytest.mark.parametrize(
    ("tokens", "weight", "bias", "error", "says"),
    [
        (None, W, W, TypeError, "tokens must be a tensor, got NoneType"),
        (X.int(), W, W, TypeError, "tokens must be float16.*got torch.int32"),
        (X, W.int(), W, TypeError, "weight must be float16"),
        (X, W, W.double(), TypeError, "bias must be torch.float32 like weight, got torch.float64"),
        (X[0], W, W, ValueError, r"tokens must be \(B, N, p\) or \(T, B, N, p\).*got \(5, 6\)"),
        (X[..., :0], W[:, :0], W[:, :0], ValueError, "p >= 1"),
        (X, V, W, ValueError, r"weight must be \(T, p\) with p = 6 and T >= 1, got \(6,\)"),
        (X, W[:0], W[:0], ValueError, r"T >= 1, got \(0, 6\)"),
        (X, W[:, :5], W, ValueError, r"weight must be \(T, p\) = \(3, 6\), got \(3, 5\)"),
        (X, W, W[:2], ValueError, r"bias must be \(T, p\) = \(3, 6\), got \(2, 6\)"),
        (X.expand(2, 2, 5, 6), W, W, ValueError, r"weight must be \(T, p\) = \(2, 6\), got \(3, 6\)"),
        (X, W.to("meta"), W, ValueError, "weight must be on cpu like tokens, got meta"),
    ],
)
def test_bad_modulation(tokens, weight, bias, error, says):
    with pytest.raises(error, match=says):
        modulate(tokens, weight, bias)
    with pytest.raises(error, match=says):
        modulate_layer_norm(tokens, weight, bias, V, V)


@pytest.mark.parametrize(
    ("norm_weight", "norm_bias", "error", "says"),
    [
        (None, V, TypeError, "norm_weight must be a tensor"),
        (V, V[:5], ValueError, r"norm_bias must be \(p,\) = \(6,\), got \(5,\)"),
        (W, V, ValueError, r"norm_weight must be \(p,\) = \(6,\), got \(3, 6\)"),
        (V, V.half(), TypeError, "norm_bias must be torch.float32 like norm_weight"),
        (V, V.to("meta"), ValueError, "norm_bias must be on cpu like tokens"),
    ],
)
def test_bad_norm(norm_weight, norm_bias, error, says):
    with pytest.raises(error, match=says):
        modulate_layer_norm(X, W, W, norm_weight, norm_bias)
