"""The split into range and null space against the rule written out in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtme_kernels import TokenSpace, split_token_space
from dtme_kernels.testing import make, orthogonal


def with_spectrum(values, seed=0, dtype=torch.float64):
    u = orthogonal(len(values), seed)
    covariance = u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ u.T
    return ((covariance + covariance.T) / 2).to(dtype)


def rank_by_hand(values, ratio):
    """Leading k with C_k / (T - C_k) < r, clamped to [1, p-1]; nothing left over counts as infinite."""
    count = 0
    for k in range(1, len(values) + 1):
        rest = sum(sorted(values)[: len(values) - k])
        count += rest > 0 and sum(sorted(values, reverse=True)[:k]) / rest < ratio
    return min(max(count, 1), len(values) - 1)


@pytest.mark.parametrize(
    ("values", "ratio", "rank"),
    [
        ([90.0, 9, 0.9, 0.1], 100, 2),  # 90/10 = 9, 99/1 = 99, 99.9/0.1 = 999: the third crosses, and is null
        ([90.0, 9, 0.9, 0.1], 1, 1),  # the first already crosses: clamped to 1
        ([1.0, 1, 1, 1], 1e9, 3),  # nothing crosses: clamped to p - 1
        ([1.0, 1, 1, 1], 1, 1),  # 1/3 < 1, 2/2 is not < 1
        ([1.0, 1, 1, 1], float("inf"), 3),
        ([5.0, 0, 0, 0], 100, 1),  # nothing left over is infinite, not NaN
        ([0.0, 0, 0, 0], 100, 1),
        ([1e8, 1.0, 1e-9, 1e-10], 1e17, 2),  # 1e8 / 1.1e-9 = 9.1e16 and 1e8 / 1e-10 = 1e18
        ([2.0, 1.0], 100, 1),
    ],
)
def test_rank_of_a_known_spectrum(values, ratio, rank):
    space = split_token_space(torch.diag(torch.tensor(values, dtype=torch.float64)), ratio)
    assert space.rank == rank
    assert isinstance(space.rank, int)
    assert space.eigenvalues.tolist() == values


def test_a_tiny_tail_is_not_lost_to_rounding():
    # total - head is 0 in float64 from the first eigenvalue on
    values = [1e20, *[1.0] * 7]
    assert split_token_space(torch.diag(torch.tensor(values, dtype=torch.float64)), 2.1e19).rank == 3
    assert rank_by_hand(values, 2.1e19) == 3


@given(
    values=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=12),
    ratio=st.sampled_from([0.5, 1.0, 10.0, 100.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_rank_follows_the_rule(values, ratio, seed):
    space = split_token_space(with_spectrum(values, seed), ratio)
    assert space.rank == rank_by_hand(space.eigenvalues.tolist(), ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_basis_is_an_eigenbasis(dtype):
    covariance = with_spectrum([5.0, 4.0, 1.0, 0.5, 1e-9], dtype=dtype)
    space = split_token_space(covariance, 10)
    u, values = space.basis.double(), space.eigenvalues.double()
    eps = torch.finfo(dtype).eps
    assert space.basis.dtype == space.eigenvalues.dtype == dtype
    assert (u.T @ u - torch.eye(5)).abs().max() < 8 * eps
    assert (u * values @ u.T - covariance).abs().max() < 40 * eps
    assert (values >= 0).all()
    assert (values.diff() <= 0).all()
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    assert torch.equal(torch.cat([space.range_basis, space.null_basis], 1), space.basis)
    assert space.range_basis.shape == (5, space.rank)


def test_layers_are_split_one_by_one():
    layers = torch.stack([with_spectrum([100.0, 10, 1, 0.1], s) for s in range(2)] + [with_spectrum([1.0, 1, 1, 0])])
    space = split_token_space(layers, 5)
    assert space.rank.dtype == torch.int64
    for d, layer in enumerate(layers):
        alone = split_token_space(layer, 5)
        assert space.rank[d] == alone.rank
        torch.testing.assert_close(space.eigenvalues[d], alone.eigenvalues)
        np.testing.assert_allclose(space.basis[d, :, : alone.rank], alone.range_basis, atol=1e-12)
    with pytest.raises(ValueError, match="this space holds 3"):
        _ = space.range_basis
    with pytest.raises(ValueError, match="this space holds 3"):
        _ = space.null_basis


def test_scale_and_rounding_do_not_matter():
    covariance = with_spectrum([50.0, 20, 3, 1, 0.1])
    space = split_token_space(covariance, 10)
    nudged = covariance + 1e-13 * torch.triu(make(5, 5, dtype=torch.float64), 1)
    for other in (covariance * 1e-12, covariance * 1e12, nudged):
        again = split_token_space(other, 10)
        assert again.rank == space.rank
        torch.testing.assert_close(again.basis, space.basis, atol=1e-9, rtol=0)


def test_negative_eigenvalues_from_rounding_are_zero():
    x = make(3, 8)  # rank 3 of 8: float32 leaves eigenvalues around -1e-7
    space = split_token_space(x.T @ x)
    assert (space.eigenvalues >= 0).all()
    assert space.rank <= 3


def test_space_is_frozen_and_moves():
    space = split_token_space(torch.stack([torch.eye(3)] * 2))
    with pytest.raises(AttributeError):
        space.rank = 1
    moved = space.to("meta")
    assert isinstance(moved, TokenSpace)
    assert moved.basis.device.type == moved.eigenvalues.device.type == moved.rank.device.type == "meta"
    assert split_token_space(torch.eye(3)).to("meta").rank == 2


def asymmetric(p=4):
    covariance = torch.eye(p)
    covariance[0, 1] = 0.01
    return covariance


@pytest.mark.parametrize(
    ("covariance", "ratio", "error", "says"),
    [
        (np.eye(3), 100, TypeError, "covariance must be a tensor, got ndarray"),
        (torch.eye(3).bfloat16(), 100, TypeError, "covariance must be float32 or float64, got torch.bfloat16"),
        (torch.eye(3).long(), 100, TypeError, "covariance must be float32 or float64"),
        (torch.ones(3, 4), 100, ValueError, r"covariance must be \(p, p\).*got \(3, 4\)"),
        (torch.ones(1, 1), 100, ValueError, "p >= 2"),
        (torch.ones(2, 2, 2, 2), 100, ValueError, "covariance must be"),
        (asymmetric(), 100, ValueError, "covariance is not symmetric"),
        (torch.stack([torch.eye(4), asymmetric()]), 100, ValueError, r"covariance of layers \[1\] is not symmetric"),
        (torch.eye(3) * float("nan"), 100, ValueError, "covariance holds NaN or Inf"),
        (
            torch.stack([torch.eye(2) / 0, torch.eye(2)]),
            100,
            ValueError,
            r"covariance of layers \[0\] holds NaN or Inf",
        ),
        (torch.eye(3), 0, ValueError, "ratio must be > 0, got 0"),
        (torch.eye(3), -1.0, ValueError, "ratio must be > 0, got -1.0"),
        (torch.eye(3), float("nan"), ValueError, "ratio must be > 0, got nan"),
    ],
)
def test_bad_input(covariance, ratio, error, says):
    with pytest.raises(error, match=says):
        split_token_space(covariance, ratio)


def test_impl_and_ratio_are_checked():
    space = split_token_space(torch.eye(3), impl="reference")
    assert torch.equal(space.basis, split_token_space(torch.eye(3)).basis)
    with pytest.raises(RuntimeError, match="triton"):
        split_token_space(torch.eye(3), impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        split_token_space(torch.eye(3), impl="fast")
    with pytest.raises(TypeError, match="ratio must be a number"):
        split_token_space(torch.eye(3), "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_eigenvectors_are_split_at_another_ratio(dtype):
    tokens = torch.randn(3, 40, 12, dtype=dtype) * torch.logspace(0, -2, 12, dtype=dtype)
    covariance = tokens.mT @ tokens
    space = split_token_space(covariance, 100.0)
    for ratio in (1e-3, 1.0, 10.0, 100, 1e9):
        for found, want in ((space, covariance), (split_token_space(covariance[1]), covariance[1])):
            again = found.at(ratio)
            direct = split_token_space(want, ratio)
            assert torch.equal(torch.as_tensor(again.rank), torch.as_tensor(direct.rank))
            assert torch.equal(again.basis, direct.basis)
    with pytest.raises(ValueError, match="ratio must be > 0"):
        space.at(0)
    with pytest.raises(TypeError, match="ratio must be a number"):
        space.at("1")
