"""Second moments against NumPy in float64."""

import numpy as np
import pytest
import torch

from dtme_kernels import token_covariance, token_covariance_
from dtme_kernels.testing import DTYPES, LAYOUTS, assert_accurate, exact, make

SHAPES = [(4, 7, 33), (2, 1, 5), (50, 64), (1, 1), (0, 3, 6), (17,), (3, 70, 130), (2, 40, 272)]


def oracle(tokens):
    (x,) = exact(tokens)
    rows = x.reshape(-1, x.shape[-1]) if x.size else np.zeros((0, x.shape[-1]))
    return np.einsum("nc,nd->cd", rows, rows)


def plain(tokens):
    rows = tokens.reshape(-1, tokens.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.T @ rows


def check(tokens, impl):
    got = token_covariance(tokens, impl=impl)
    assert got.dtype == (torch.float64 if tokens.dtype == torch.float64 else torch.float32)
    assert torch.equal(got, got.T)
    assert_accurate(got, oracle(tokens), plain(tokens), terms=tokens.shape[:-1].numel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_oracle(impl, shape, dtype):
    check(make(*shape, dtype=dtype), impl)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, layout):
    check(make(6, 7, 9, layout=layout), impl)
    check(make(6, 7, 5, 9, layout=layout)[:, 1:, ::2], impl)  # no two strides address these tokens
    check(make(6, 7, 9, layout=layout)[:, 1:], impl)  # two do
    check(make(6, 7, 9, layout=layout).transpose(0, 1), impl)


@pytest.mark.float64
def test_gradients(impl):
    tokens = make(3, 4, 5, dtype=torch.float64, layout="transposed", requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: token_covariance(x, impl=impl), tokens)
    assert token_covariance(tokens[:0], impl=impl).grad_fn


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [12, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_is_as_right_as_plain_torch(impl, dtype, p, layout):
    tokens, grad = make(5, 8, p, dtype=dtype, layout=layout, requires_grad=True), make(p, 1, seed=1).expand(p, p)
    (got,) = torch.autograd.grad(token_covariance(tokens, impl=impl), tokens, grad)
    (by_torch,) = torch.autograd.grad(plain(tokens), tokens, grad)
    x, g = exact(tokens, grad)
    assert got.dtype == dtype
    assert_accurate(got, x @ (g + g.T), by_torch)


@pytest.mark.parametrize("master", [torch.float32, torch.float64])
def test_accumulates_every_layer_in_one_call(impl, master):
    layers = [make(2, 5, 7), make(3, 7, dtype=torch.float16), make(0, 4, 7), make(2, 9, 7, layout="transposed")]
    accumulator = make(4, 7, 7, dtype=master).mul(0.5)
    accumulator += accumulator.mT.clone()
    start = accumulator.clone()
    assert token_covariance_(accumulator, layers, impl=impl) is accumulator
    token_covariance_(accumulator, tuple(layers), impl=impl)
    for layer, before, x in zip(accumulator, start, layers, strict=True):
        want = exact(before)[0] + 2 * oracle(x)
        assert_accurate(layer, want, before + plain(x) + plain(x), terms=2 * x.shape[:-1].numel())
        assert torch.equal(layer, layer.T)


def test_accumulates_into_a_view(impl):
    storage = torch.zeros(3, 6, 6)
    token_covariance_(storage[1].T, make(4, 6), impl=impl)
    token_covariance_(storage[::2], [make(4, 6), make(4, 6)], impl=impl)
    assert torch.equal(storage, token_covariance(make(4, 6), impl=impl).expand(3, 6, 6))


def test_a_lazy_clone_becomes_a_real_one(impl):
    original = torch.zeros(6, 6)
    accumulator = token_covariance_(torch._lazy_clone(original), make(4, 6), impl=impl)
    assert accumulator.any()
    assert not original.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_layers_of_many_tokens(impl, dtype):
    """Splits of the tokens, long sums, and layers of two layouts between each other."""
    layers = [make(5, 400, 24, dtype=dtype, seed=d) for d in range(5)]
    layers[1:4:2] = [x.mT.contiguous().mT for x in layers[1:4:2]]
    sums = token_covariance_(torch.zeros(5, 24, 24, dtype=torch.float64), layers, impl=impl)
    for layer, x in zip(sums, layers, strict=True):
        assert torch.equal(layer, layer.T)
        assert_accurate(layer.float(), oracle(x), plain(x), terms=2000)


def test_small_updates_are_not_lost(impl):
    # 4096 + 1 is not a float16, 2**24 + 1 not a float32
    accumulator = token_covariance_(torch.zeros(1, 1), torch.ones(4097, 1, dtype=torch.float16), impl=impl)
    assert accumulator.item() == 4097
    accumulator = torch.full((1, 1), 2.0**24, dtype=torch.float64)
    for _ in range(100):
        token_covariance_(accumulator, torch.ones(1, 1), impl=impl)
    assert accumulator.item() == 2**24 + 100


@pytest.mark.float64
def test_float64_tokens_stay_float64(impl):
    tokens = make(30, 5, dtype=torch.float64)
    accumulator = token_covariance_(torch.zeros(5, 5, dtype=torch.float64), tokens, impl=impl)
    assert_accurate(accumulator, oracle(tokens), plain(tokens), terms=30)


def test_no_gradient_flows_into_the_accumulator(impl):
    accumulator = token_covariance_(torch.zeros(5, 5), make(3, 5, requires_grad=True), impl=impl)
    assert not accumulator.requires_grad


@pytest.mark.parametrize(
    ("tokens", "error", "says"),
    [
        ([1.0, 2.0], TypeError, "tokens must be a tensor, got list"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "tokens must be float16.*got torch.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), TypeError, "tokens must be float16"),
        (torch.tensor(1.0), ValueError, r"tokens must be \(\.\.\., p\) with p >= 1, got \(\)"),
        (torch.ones(3, 0), ValueError, r"p >= 1, got \(3, 0\)"),
    ],
)
def test_bad_tokens(tokens, error, says):
    with pytest.raises(error, match=says):
        token_covariance(tokens)


@pytest.mark.parametrize(
    ("accumulator", "tokens", "error", "says"),
    [
        (torch.zeros(3, 3, dtype=torch.bfloat16), make(2, 3), TypeError, "accumulator must be float32 or float64"),
        (torch.zeros(3, 4), make(2, 3), ValueError, r"accumulator must be \(p, p\) or \(D, p, p\) .*got \(3, 4\)"),
        (torch.zeros(4), make(2, 4), ValueError, r"accumulator must be \(p, p\) or \(D, p, p\) .*got \(4,\)"),
        (torch.zeros(3), make(2, 3), ValueError, "accumulator must be"),
        (torch.zeros(3, 3, requires_grad=True), make(2, 3), ValueError, "accumulator must not require grad"),
        (torch.zeros(3).expand(2, 3, 3), [make(2, 3)] * 2, ValueError, "accumulator must not overlap"),
        (torch.zeros(3, 3), [make(2, 3)], TypeError, "tokens must be a tensor, got list"),
        (torch.zeros(3, 3), make(2, 4), ValueError, r"tokens must be .* with p = 3, got \(2, 4\)"),
        (torch.zeros(3, 3), torch.ones(2, 3, device="meta"), ValueError, "tokens must be on cpu like accumulator"),
        (torch.zeros(2, 3, 3), make(2, 2, 3), TypeError, "tokens must be a sequence of D = 2"),
        (torch.zeros(2, 3, 3), [make(2, 3)], ValueError, "tokens must be a sequence of D = 2 .*got 1"),
        (torch.zeros(2, 3, 3), [make(2, 3), make(2, 2)], ValueError, r"tokens\[1\] must be .*got \(2, 2\)"),
        (torch.zeros(2, 3, 3), [make(2, 3), None], TypeError, r"tokens\[1\] must be a tensor, got NoneType"),
    ],
)
def test_bad_accumulation_changes_nothing(accumulator, tokens, error, says):
    with pytest.raises(error, match=says):
        token_covariance_(accumulator, tokens)
    assert not accumulator.any()


def test_operator_takes_tokens_that_require_grad_and_float64_into_float32():
    tokens = make(6, 3, dtype=torch.float64, requires_grad=True)
    accumulator = torch.zeros(1, 3, 3)
    torch.ops.dtme.token_covariance_(accumulator, [tokens])
    assert not accumulator.requires_grad
    want = (tokens.T @ tokens).detach().float()
    torch.testing.assert_close(token_covariance_(torch.zeros(3, 3), tokens), want)
    torch.testing.assert_close(accumulator[0], want)


def test_autograd_sees_that_the_accumulator_has_changed(impl):
    sums, leaf = torch.zeros(8, 8), torch.ones(8, 8, requires_grad=True)
    product = (sums * leaf).sum()
    token_covariance_(sums, make(3, 8), impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_sparse_tensors_are_the_reference_s():
    tokens = make(5, 6, requires_grad=True)
    picked = torch.gather(token_covariance(tokens), 0, torch.tensor([[0, 2]]), sparse_grad=True)
    (got,) = torch.autograd.grad(picked.sum(), tokens)
    (want,) = torch.autograd.grad(token_covariance(tokens)[[0, 2], [0, 1]].sum(), tokens)
    torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="impl='cpp' cannot run token_covariance: "):
        token_covariance(tokens.detach().to_sparse(), impl="cpp")
