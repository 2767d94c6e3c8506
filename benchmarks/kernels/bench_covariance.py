"""Second moments of all blocks' tokens, added to running sums (Eq. 1)."""

import pytest
import torch

from dtme_kernels import token_covariance_


def printed(accumulator, tokens):
    """One block after the other, a product and a sum."""
    for layer, x in zip(accumulator, tokens, strict=True):
        rows = x.flatten(0, 1)
        layer += rows.T @ rows


RIVALS = {"printed": printed, "ours": token_covariance_}


@pytest.mark.parametrize("name", RIVALS)
def test_covariance(benchmark, shape, name):
    rival = RIVALS[name]
    tokens = [torch.randn(shape.images, shape.tokens, shape.channels) for _ in range(shape.blocks)]
    want = sum(x.flatten(0, 1).double().T @ x.flatten(0, 1).double() for x in tokens)
    accumulator = torch.zeros(shape.blocks, shape.channels, shape.channels)
    rival(accumulator, tokens)
    torch.testing.assert_close(accumulator.double().sum(0), want, rtol=1e-4, atol=1e-2)
    benchmark(rival, accumulator, tokens)
