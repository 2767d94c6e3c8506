"""Elements that lie further apart than 31 bits count: memory is reserved, and touched only where the elements are."""

import pytest
import torch

from dtme_kernels import count_conflicts, expanded_attention, modulate_layer_norm, projected_dots, token_covariance
from dtme_kernels.testing import make, orthogonal

FAR = 2**31 + 7


@pytest.fixture(scope="module")
def apart():
    """``apart(x, dim)``: the same tensor with its two entries in ``dim`` FAR elements from each other."""
    storage = torch.empty(FAR + 10_000, dtype=torch.bfloat16)

    def spread(x, dim=0):
        x = x.movedim(dim, 0)
        rest = x[0].contiguous()
        view = storage.as_strided(x.shape, (FAR, *rest.stride())).movedim(0, dim)
        return view.copy_(x.movedim(0, dim))

    return spread


def test_tokens(apart, impl):
    tokens = make(2, 5, 24).bfloat16()
    assert torch.equal(token_covariance(apart(tokens), impl=impl), token_covariance(tokens, impl=impl))
    args = make(3, 24), make(3, 24), make(24), make(24)
    for got, want in zip(
        modulate_layer_norm(apart(tokens), *args, impl=impl), modulate_layer_norm(tokens, *args, impl=impl), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dim", [0, 1])
def test_gradients(apart, impl, dim):
    grads, basis = make(2, 2, 24).bfloat16(), orthogonal(24)
    assert torch.equal(count_conflicts(apart(grads, dim), basis, 5, impl=impl).null,
                       count_conflicts(grads, basis, 5, impl=impl).null)  # fmt: skip
    for got, want in zip(
        projected_dots(apart(grads, dim), basis, 5, impl=impl), projected_dots(grads, basis, 5, impl=impl), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dim", [0, 1])
def test_queries(apart, impl, dim):
    query, shared, task = (make(*shape).bfloat16() for shape in ((2, 2, 3, 5, 16), (2, 2, 3, 5, 16), (2, 3, 4, 16)))
    want = expanded_attention(query, shared, shared, task, task, impl=impl)
    assert torch.equal(expanded_attention(apart(query, dim), shared, shared, task, task, impl=impl), want)
