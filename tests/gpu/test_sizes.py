"""Real sizes: errors at M and p of ViTs, offsets past 2**31, memory."""

import pytest
import torch

from dtme_kernels import count_conflicts, projected_dots, token_covariance, token_covariance_
from dtme_kernels.testing import assert_accurate, make
from tests.gpu.memory import peak_bytes

LOW = [torch.bfloat16, torch.float16]


def basis_of(p, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(p, p, dtype=torch.float64)).Q.to(dtype)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize(("batch", "tokens", "p"), [(64, 197, 192), (6, 1024, 768), (6, 1008, 1024), (2, 197, 2048)])
def test_covariance(batch, tokens, p, dtype):
    layers = [torch.randn(batch, tokens, p).add_(0.5).to(dtype) for _ in range(4)]
    sums = token_covariance_(torch.zeros(4, p, p), layers, impl="triton")
    for layer, x in zip(sums, layers, strict=True):
        rows = x.flatten(0, 1)
        assert torch.equal(layer, layer.T)
        want = rows.double().T @ rows.double()
        assert_accurate(layer, want.cpu(), rows.float().T @ rows.float(), terms=len(rows))


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("num_tasks", [2, 3, 4, 5, 8, 11, 16])
@pytest.mark.parametrize("p", [192, 768, 2048])
def test_conflicts(num_tasks, p, dtype):
    grads, basis, rank = torch.randn(num_tasks, 2000, p).to(dtype), basis_of(p), p // 3
    got = count_conflicts(grads, basis, rank, impl="triton")
    want = count_conflicts(grads.double(), basis.double(), rank, impl="reference")
    signs = 2000 * num_tasks * (num_tasks - 1)
    assert torch.equal(got.valid, want.valid)
    for a, b in ((got.range, want.range), (got.null, want.null)):
        assert (a - b).abs().sum() <= 2 + 2e-5 * signs  # dots within rounding of zero
    dots = projected_dots(grads, basis, rank, impl="triton")
    exactly = projected_dots(grads.double(), basis.double(), rank, impl="reference")
    plain = projected_dots(grads, basis, rank, impl="reference")
    for a, b, c in zip(dots, exactly, plain, strict=True):
        assert_accurate(a, b.cpu(), c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_weak_null_space_of_a_large_model(dtype):
    """Range over null amplitude 1000 at p = 768: as right as float32, though tensor cores round towards zero."""
    p, rank = 768, 256
    basis = basis_of(p, torch.float64)
    amplitude = torch.ones(p, dtype=torch.float64)
    amplitude[:rank] = 1000
    grads = ((torch.randn(4, 20000, p, dtype=torch.float64) * amplitude) @ basis.T).mul_(0.1).to(dtype)
    want = projected_dots(grads.double(), basis, rank, impl="reference")[1] <= 0
    wrong, plainly = (
        ((projected_dots(grads, basis.float(), rank, impl=impl)[1] <= 0) != want).double().mean().item()
        for impl in ("triton", "reference")
    )
    assert wrong <= 2 * plainly + 5e-5


@pytest.mark.alone
def test_offsets_past_two_to_the_31():
    p, tail = 768, 100
    tokens = torch.zeros(2**31 // p + 2000, p, dtype=torch.bfloat16)
    tokens[-tail:] = torch.randn(tail, p)
    torch.testing.assert_close(token_covariance(tokens, impl="triton"), token_covariance(tokens[-tail:].clone()))
    grads, basis = tokens.view(2, -1, p), basis_of(p)
    grads[0, -tail:] = torch.randn(tail, p)
    got = count_conflicts(grads, basis, 300, impl="triton")
    want = count_conflicts(grads[:, -tail:].double(), basis.double(), 300)
    assert torch.equal(got.valid, want.valid)
    assert torch.equal(got.range, want.range)
    assert torch.equal(got.null, want.null)
    strided = tokens.view(-1)[: 2 * (len(tokens) // 2) * p].view(p, -1, 2).permute(2, 1, 0)  # channels far apart
    got = count_conflicts(strided[:, :500], basis, 300, impl="triton")
    assert torch.equal(got.valid, count_conflicts(strided[:, :500].clone(), basis, 300).valid)


@pytest.mark.alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("images", [6, 60])
def test_memory_beyond_the_inputs(images, dtype):
    """Copies and dots of a slab of tokens, whatever the number of tokens; the basis was split before."""
    from dtme_kernels.conflicts.kernel import SLAB

    grads, basis = torch.randn(5, images, 1024, 768, dtype=dtype), basis_of(768)
    counts = count_conflicts(grads, basis, 251, impl="triton")
    peak = peak_bytes(lambda: count_conflicts(grads, basis, 251, impl="triton"))
    assert peak <= 1.02 * SLAB
    assert counts.valid[0, 1] == images * 1024


def test_nothing_is_left_unwritten():
    """The allocator hands out memory full of NaN."""
    for function in (
        lambda: count_conflicts(make(5, 300, 80), basis_of(80), 33),
        lambda: token_covariance(make(999, 80)),
    ):
        blocks = [torch.full((2**22,), float("nan")) for _ in range(8)]
        del blocks
        result = function()
        tensors = [result] if isinstance(result, torch.Tensor) else [result.range, result.null, result.valid]
        assert all(x.isfinite().all() for x in tensors)
        if len(tensors) > 1:
            assert result.valid.sum() == 300 * 20
