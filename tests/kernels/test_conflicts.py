"""Conflict counts and dots against Eq. 4 as the paper writes it: projectors, in NumPy's float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from dtme_kernels import ConflictCounts, count_conflicts, projected_dots, split_token_space, token_covariance
from dtme_kernels.conflicts import reference
from dtme_kernels.testing import DTYPES, LAYOUTS, assert_accurate, exact, make, orthogonal

SHAPES = [(2, 5, 4), (3, 4, 7, 33), (4, 2, 1, 9), (5, 6), (2, 0, 3, 8), (11, 20, 12), (5, 70, 144), (16, 9, 20)]


def dots_oracle(grads, basis, rank):
    """(P, ...) of <P_R g_i, P_R g_j> and of <P_N g_i, P_N g_j>."""
    g, u = exact(grads, basis)
    dots = []
    for part in (u[:, :rank], u[:, rank:]):
        projected = g @ (part @ part.T)
        dots.append([np.sum(a * b, -1) for a, b in itertools.combinations(projected, 2)])
    return np.array(dots)


def counts_oracle(grads, basis, rank, count_zero_gradients=False):
    """range, null and valid, (K, K), and the number of pairs that are not finite."""
    (g,) = exact(grads)
    with np.errstate(invalid="ignore"):
        peak = np.abs(g).max(-1)
        g = g / np.where(peak > 0, peak, 1)[..., None]
        dots = dots_oracle(torch.from_numpy(g), basis, rank)
    counts, nonfinite = np.zeros((3, len(g), len(g)), int), 0
    for pair, (i, j) in enumerate(itertools.combinations(range(len(g)), 2)):
        finite = np.isfinite(peak[i]) & np.isfinite(peak[j])
        valid = finite if count_zero_gradients else finite & (peak[i] > 0) & (peak[j] > 0)
        for space, mask in enumerate((dots[0, pair] <= 0, dots[1, pair] <= 0, np.ones_like(valid))):
            counts[space, i, j] = counts[space, j, i] = (mask & valid).sum()
        nonfinite += (~finite).sum()
    return *counts, nonfinite


def check(got, want):
    for name, counts in zip(("range", "null", "valid"), want, strict=False):
        assert getattr(got, name).dtype == torch.int64
        np.testing.assert_array_equal(getattr(got, name).cpu(), counts, err_msg=name)
    assert got.nonfinite == want[3]
    assert isinstance(got.nonfinite, int)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_match_oracle(impl, shape, dtype):
    grads, basis, rank = make(*shape, dtype=dtype), orthogonal(shape[-1]), shape[-1] // 3
    got = count_conflicts(grads, basis, rank, impl=impl)
    check(got, counts_oracle(grads, basis, rank))
    assert got.tokens == math.prod(shape[1:-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, layout):
    grads, basis = make(4, 6, 5, 8, layout=layout), orthogonal(8, dtype=torch.float32).T
    rows = make(4, 6, 5, 3, 8, layout=layout)[:, :, 1:, ::2]  # no two strides address these tokens
    for x in (grads, grads.permute(2, 1, 0, 3), grads[:, :, 1:], rows):
        check(count_conflicts(x, basis, 3, impl=impl), counts_oracle(x, basis, 3))


def test_chunks_do_not_show(impl, monkeypatch):
    grads, basis = make(3, 40, 7, 8), orthogonal(8)
    want, dots = counts_oracle(grads, basis, 3), projected_dots(grads, basis, 3, impl=impl)
    for chunk in (1, 1000, 3 * 7 * 8 * 9):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        if impl == "triton":
            from dtme_kernels.conflicts import kernel

            monkeypatch.setattr(kernel, "SLAB", 8 * chunk)
        check(count_conflicts(grads, basis, 3, impl=impl), want)
        for x, y in zip(projected_dots(grads, basis, 3, impl=impl), dots, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("shape", "ranks"), [((4, 6, 7, 40), [31, 3, 17, 16, 3, 39]), ((3, 50, 150), (64, 65, 128, 149))]
)
def test_several_ranks_at_once(impl, shape, ranks):
    grads, basis = make(*shape), orthogonal(shape[-1])
    together = count_conflicts(grads, basis, ranks, impl=impl)
    assert together.range.shape == together.null.shape == together.valid.shape == (len(ranks), shape[0], shape[0])
    assert len(list(together)) == len(ranks)
    for counts, rank in zip(together, ranks, strict=True):
        check(counts, counts_oracle(grads, basis, rank))
        assert counts.tokens == together.tokens == math.prod(shape[1:-1])
    both = together + together
    assert torch.equal(both[1].range, 2 * together[1].range)
    tensor = count_conflicts(grads, basis, torch.tensor(ranks), impl=impl)
    assert torch.equal(tensor.null, together.null)


def test_several_ranks_have_several_rates():
    together = count_conflicts(make(3, 7, 5), orthogonal(5), [1, 2])
    assert together[1].rate("null") == count_conflicts(make(3, 7, 5), orthogonal(5), 2).rate("null")
    with pytest.raises(ValueError, match=r"counts at 2 ranks: take one, counts\[r\].rate\('null'\)"):
        together.rate("null")
    with pytest.raises(TypeError, match="the counts at one rank"):
        together[0][0]
    with pytest.raises(ValueError, match="counts of 3 tasks at 2 ranks and of 3 tasks"):
        together + together[0]


def test_low_precision_basis(impl, dtype=torch.float16):
    """Products of float16 with float16 are exact in float32, so the counts are those of the basis as it is rounded."""
    grads, basis = make(4, 200, 48, dtype=dtype), orthogonal(48, dtype=dtype)
    want = count_conflicts(grads.double(), basis.double(), 20, impl="reference")  # no projector: U^T U is not 1
    got = count_conflicts(grads, basis, 20, impl=impl)
    assert torch.equal(got.range, want.range)
    assert torch.equal(got.null, want.null)


def test_a_weak_null_space_keeps_its_signs(impl):
    """Range over null amplitude 1000: "total minus range" gets about 2 % of these signs wrong."""
    p, rank = 192, 64
    basis = orthogonal(p)
    amplitude = torch.cat([torch.full((rank,), 1000.0), torch.ones(p - rank)]).double()
    grads = ((make(4, 2000, p, dtype=torch.float64) * amplitude) @ basis.T).float()
    range_dots, null_dots = projected_dots(grads, basis, rank, impl=impl)
    truth = dots_oracle(grads, basis, rank)[1]
    wrong = ((null_dots.cpu().numpy() <= 0) != (truth <= 0)).mean()
    assert wrong < 2e-4
    total = torch.stack([(a * b).sum(-1) for a, b in itertools.combinations(grads, 2)])
    assert (((total - range_dots).cpu().numpy() <= 0) != (truth <= 0)).mean() > 5e-3
    got = count_conflicts(grads, basis, rank, impl=impl)
    want = counts_oracle(grads, basis, rank)
    np.testing.assert_array_equal(got.range.cpu(), want[0])
    assert np.abs(got.null.cpu().numpy() - want[1]).sum() < 2e-4 * want[2].sum()


@pytest.mark.parametrize("amplitude", [1, 10, 1000])
@pytest.mark.parametrize("rank", [5, 64, 150])
def test_counts_of_a_weak_space_are_exact(impl, amplitude, rank):
    """Kernels that rotate into the smaller space only have to see where the other one cannot be had from it."""
    p = 192
    basis = orthogonal(p)
    strength = torch.cat([torch.full((rank,), float(amplitude)), torch.ones(p - rank)]).double()
    grads = (make(3, 130, p, dtype=torch.float64, seed=rank) * strength @ basis.T).float()
    grads[1, :20] = 0
    grads[2, 30] = float("nan")
    count_zero = amplitude == 10
    got = count_conflicts(grads, basis, rank, count_zero_gradients=count_zero, impl=impl)
    check(got, counts_oracle(grads, basis, rank, count_zero))


def test_a_basis_that_is_not_orthonormal(impl):
    """What one space has is then not what the other leaves."""
    basis = orthogonal(192, dtype=torch.float32) + 1e-3 * make(192, 192, seed=1)
    grads = make(3, 130, 192, seed=2)
    want = count_conflicts(grads.double(), basis.double(), 40, impl="reference")
    got = count_conflicts(grads, basis, 40, impl=impl)
    assert torch.equal(got.range, want.range)
    assert torch.equal(got.null, want.null)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_magnitude_does_not_matter(impl, dtype):
    """Loss scales differ by task and gradients shrink with image size; a sign must not depend on either."""
    grads, basis = make(4, 30, 16, dtype=dtype), orthogonal(16)
    tiny = torch.finfo(dtype).tiny
    for scales in ([1e-30] * 4, [1e30] * 4, [1e-37, 1e37, 1e-20, 1], [tiny, 2.0**120, 2.0**-120, tiny]):
        scaled = (grads.double() * torch.tensor(scales, dtype=torch.float64)[:, None, None]).to(dtype)
        check(count_conflicts(scaled, basis, 5, impl=impl), counts_oracle(scaled, basis, 5))


def test_the_smallest_and_the_largest_numbers(impl):
    smallest, largest = 2.0**-149, torch.finfo(torch.float32).max
    grads = torch.tensor([[[1.0, 1.0]], [[smallest, 2 * smallest]], [[largest, largest]]])
    counts = count_conflicts(grads, torch.eye(2), 1, impl=impl)
    assert counts.rate("range") == counts.rate("null") == 0
    counts = count_conflicts(grads * torch.tensor([1.0, -1]), torch.eye(2), 1, impl=impl) + counts
    assert counts.valid.sum() == 12


def test_zero_gradients_are_not_conflicts(impl):
    grads = make(3, 10, 6)
    grads[0, :4] = 0
    grads[1, 2:6] = -0.0
    basis = orthogonal(6)
    for count_zero in (False, True):
        got = count_conflicts(grads, basis, 2, count_zero_gradients=count_zero, impl=impl)
        check(got, counts_oracle(grads, basis, 2, count_zero))
    got = count_conflicts(grads[:2, :4], basis, 2, impl=impl)
    assert math.isnan(got.rate("range"))
    assert math.isnan(got.rate("null"))
    letter = count_conflicts(grads[:2, :4], basis, 2, count_zero_gradients=True, impl=impl)
    assert letter.rate("range") == letter.rate("null") == 1


def test_orthogonal_gradients_conflict(impl):
    """A dot of exactly zero is a conflict (<= 0), in the space where it is zero."""
    grads = torch.tensor([[[1.0, 0, 1]], [[0, 1, 1]]])
    got = count_conflicts(grads, torch.eye(3), 2, impl=impl)
    assert (got.rate("range"), got.rate("null")) == (1, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("count_zero", [False, True])
def test_nonfinite_gradients_are_left_out_and_counted(impl, bad, count_zero):
    grads, basis = make(4, 9, 6), orthogonal(6)
    grads[1, 2, 3] = bad
    grads[1, 5] = bad
    grads[2, 5, 0] = bad
    grads[0, 2] = 0
    got = count_conflicts(grads, basis, 2, count_zero_gradients=count_zero, impl=impl)
    check(got, counts_oracle(grads, basis, 2, count_zero))
    assert got.nonfinite == 3 + 5


def test_from_tokens_to_counts(impl):
    """The three steps together, float64 basis and float32 gradients."""
    tokens, grads = make(8, 5, 16) * torch.linspace(4, 0.1, 16), make(3, 8, 5, 16, seed=1)
    space = split_token_space(token_covariance(tokens.double()), 10)
    got = count_conflicts(grads, space.basis, space.rank, impl=impl)
    check(got, counts_oracle(grads, space.basis, space.rank))
    layers = split_token_space(token_covariance(tokens).expand(2, 16, 16), 10)
    again = count_conflicts(grads, layers.basis[1], layers.rank[1], impl=impl)
    assert torch.equal(again.null, got.null)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dots_match_oracle(impl, shape, dtype):
    grads, basis, rank = make(*shape, dtype=dtype), orthogonal(shape[-1]), max(1, shape[-1] // 3)
    wide = torch.promote_types(dtype, torch.float32)
    parts = [grads.to(wide) @ u @ u.T for u in basis.to(wide).split([rank, shape[-1] - rank], 1)]
    plain = [torch.stack([(a * b).sum(-1) for a, b in itertools.combinations(part, 2)]) for part in parts]
    for got, want, by_torch in zip(
        projected_dots(grads, basis, rank, impl=impl), dots_oracle(grads, basis, rank), plain, strict=True
    ):
        assert got.dtype == wide
        assert_accurate(got, want, by_torch, terms=shape[-1])  # the order in which torch adds is its BLAS's


@pytest.mark.float64
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"expanded"}))
def test_gradients_of_dots(impl, layout):
    grads = make(3, 2, 3, 5, dtype=torch.float64, layout=layout, requires_grad=True)
    basis = make(5, 5, dtype=torch.float64, layout=layout, seed=1, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g, u: projected_dots(g, u, 2, impl=impl), (grads, basis))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(4, 3, 6), (3, 5, 40, 70), (2, 0, 5), (12, 9, 20)])
def test_gradients_of_dots_are_as_right_as_plain_torch(impl, shape, dtype):
    p, rank = shape[-1], shape[-1] // 3
    leaves = make(*shape, dtype=dtype, requires_grad=True), make(p, p, seed=1, requires_grad=True)
    weights = make(2, math.comb(shape[0], 2), *shape[1:-1], seed=2)

    def gradients(leaves, impl):
        dots = projected_dots(*leaves, rank, impl=impl)
        return torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, dots, strict=True)), leaves)

    exactly = gradients([x.detach().double().requires_grad_() for x in leaves], "reference")
    for leaf, got, want, plain in zip(
        leaves, gradients(leaves, impl), exactly, gradients(leaves, "reference"), strict=True
    ):
        assert got.dtype == leaf.dtype
        assert_accurate(got, want.cpu(), plain, terms=math.prod(shape[1:-1]))


def counts_of(*shape, seed=0):
    return count_conflicts(make(*shape, seed=seed), orthogonal(shape[-1]), 2)


def test_counts_add():
    whole, rest = counts_of(3, 7, 5), counts_of(3, 4, 5, seed=1)
    both = whole + rest
    assert both.tokens == 11
    for name in ("range", "null", "valid"):
        assert torch.equal(getattr(both, name), getattr(whole, name) + getattr(rest, name))
    pairs = np.triu_indices(3, 1)
    assert both.rate("range") == both.range.numpy()[pairs].sum() / both.valid.numpy()[pairs].sum()
    assert (both.range.diagonal() == 0).all()
    with pytest.raises(ValueError, match="counts of 3 and of 2 tasks"):
        whole + counts_of(2, 4, 5)
    with pytest.raises(TypeError, match="unsupported operand"):
        whole + 1


def test_counts_are_frozen_and_know_two_spaces():
    counts = counts_of(3, 7, 5)
    assert isinstance(counts, ConflictCounts)
    with pytest.raises(AttributeError):
        counts.tokens = 3
    with pytest.raises(ValueError, match="space must be 'range' or 'null', got 'valid'"):
        counts.rate("valid")
    assert math.isnan(counts_of(3, 0, 5).rate("null"))


G, U = make(3, 7, 5), make(5, 5)


@pytest.mark.parametrize("function", [count_conflicts, projected_dots])
@pytest.mark.parametrize(
    ("grads", "basis", "rank", "error", "says"),
    [
        ([G], U, 2, TypeError, "grads must be a tensor, got list"),
        (G.long(), U, 2, TypeError, "grads must be float16.*got torch.int64"),
        (G, U.long(), 2, TypeError, "basis must be float16"),
        (G[0, 0], U, 2, ValueError, r"grads must be \(K, \.\.\., p\) with K >= 2.*got \(5,\)"),
        (G[:1], U, 2, ValueError, r"K >= 2.*got \(1, 7, 5\)"),
        (G[..., :1], U, 1, ValueError, "p >= 2"),
        (G, U[:4], 2, ValueError, r"basis must be \(p, p\) = \(5, 5\), got \(4, 5\)"),
        (G, U.to("meta"), 2, ValueError, "basis must be on cpu like grads, got meta"),
        (G, U, 0, ValueError, r"rank must be in \[1, p-1\] = \[1, 4\], got 0"),
        (G, U, 5, ValueError, r"rank must be in \[1, p-1\] = \[1, 4\], got 5"),
        (G, U, 2.0, TypeError, "rank must be an int, got 2.0"),
        (G, U, True, TypeError, "rank must be an int, got True"),
        (G, U, None, TypeError, "rank must be an int, got None"),
        (G, U, "3", TypeError, "rank must be an int|rank.0. must be an int, got '3'"),
    ],
)
def test_bad_input(function, grads, basis, rank, error, says):
    with pytest.raises(error, match=says):
        function(grads, basis, rank)


@pytest.mark.parametrize(
    ("ranks", "error", "says"),
    [
        ([2, 5], ValueError, r"rank must increase within \[1, p-1\] = \[1, 4\], got \[2, 5\]"),
        ([2.5], TypeError, r"rank\[0\] must be an int, got 2.5"),
        ([], ValueError, "rank must hold at least one rank"),
    ],
)
def test_bad_ranks(ranks, error, says):
    with pytest.raises(error, match=says):
        count_conflicts(G, U, ranks)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_basis_that_is_not_finite_makes_every_pair_invalid(impl, bad, dtype):
    basis = orthogonal(20, dtype=dtype)
    basis[7, 2] = bad
    for rank in (2, 3):  # the bad eigenvector in the null space and in the range
        counts = count_conflicts(make(3, 9, 20, dtype=dtype), basis, rank, impl=impl)
        assert not counts.valid.any() and not counts.range.any() and counts.nonfinite == 27
        assert math.isnan(counts.rate("range"))


def test_a_basis_that_is_singular_where_nobody_looks(impl):
    """However a kernel finds out that a basis is not orthonormal: here it is so but for one direction of the channels.

    Random directions of plus and minus one, which an estimate would be made along, are all but one in two free of it.
    """
    p, tokens = 130, 200
    for other in range(1, 17):
        lost = torch.zeros(p)
        lost[0], lost[other] = 0.5**0.5, -(0.5**0.5)
        basis = torch.eye(p) - torch.outer(lost, lost)
        kept = 0.5 * torch.eye(p)[120]
        grads = torch.stack([(lost + kept).expand(tokens, p), (lost - kept).expand(tokens, p)])
        assert count_conflicts(grads, basis, 30, impl=impl).null[0, 1] == tokens
