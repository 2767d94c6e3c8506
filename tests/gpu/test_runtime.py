"""What a training loop does to an operation: compile, capture, autocast, another device; and no wait for the host."""

import pytest
import torch

from dtme_kernels import StreamingCovariance, count_conflicts, projected_dots, token_covariance, token_covariance_
from dtme_kernels.testing import make, orthogonal

P, RANK = 96, 40


def arguments(batch, dtype=torch.bfloat16):
    return make(4, batch, 197, P, dtype=dtype), orthogonal(P, dtype=torch.float32).cuda()


def step(accumulator, grads, basis):
    token_covariance_(accumulator, [grads[0], grads[1]])
    counts = count_conflicts(grads, basis, RANK)
    dots, _ = projected_dots(grads, basis, RANK)
    return counts.range, counts.null, counts.valid, dots.sum() + token_covariance(grads[0]).sum()


def check(got, want):
    """Counts exactly; sums in any order."""
    for a, b in zip(got, want, strict=True):
        if b.is_floating_point():
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
        else:
            assert torch.equal(a, b)


def test_one_graph_and_no_recompilation_for_another_batch():
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch in (8, 9, 13):
        grads, basis = arguments(batch)
        sums, again = torch.zeros(2, P, P, dtype=torch.float64), torch.zeros(2, P, P, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=batch != 8):
            got = compiled(sums, grads, basis)
        check([sums, *got], [again, *step(again, grads, basis)])


def test_one_kernel_for_every_batch():
    from dtme_kernels.conflicts import kernel as conflicts
    from dtme_kernels.covariance import kernel as covariance

    def compiled():
        kernels = (
            conflicts.prepare_gradients,
            conflicts.pair_dots,
            conflicts.settle,
            conflicts.count,
            covariance._multiply,
            covariance._accumulate,
        )
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    step(torch.zeros(2, P, P), *arguments(8))
    before = compiled()
    for batch in (1, 5, 16, 17):
        step(torch.zeros(2, P, P), *arguments(batch))
    assert compiled() == before


def test_gradients_compile():
    grads, basis = arguments(3, torch.float32)
    leaves = grads.requires_grad_(), basis.requires_grad_()

    def loss(grads, basis):
        return sum(x.tanh().sum() for x in projected_dots(grads, basis, RANK)) + token_covariance(grads).square().mean()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    check(got, torch.autograd.grad(loss(*leaves), leaves))


def test_nothing_waits_for_the_host():
    sums, (grads, basis) = torch.zeros(2, P, P), arguments(5)
    step(sums, grads, basis)
    ranks = [10, 40, 90]
    count_conflicts(grads, basis, ranks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(sums, grads, basis)
        count_conflicts(grads, basis, ranks)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    sums, (grads, basis) = torch.zeros(2, P, P, dtype=torch.float64), arguments(5)
    step(sums.clone(), grads, basis)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(sums, grads, basis)
    for seed in (1, 2):
        grads.copy_(make(*grads.shape, seed=seed))
        sums.zero_()
        graph.replay()
        again = torch.zeros_like(sums)
        check([sums, *captured], [again, *step(again, grads, basis)])


def test_autocast_changes_nothing():
    grads, basis = arguments(5, torch.float32)
    want = step(torch.zeros(2, P, P), grads, basis)
    with torch.autocast("cuda", torch.bfloat16):
        got = step(torch.zeros(2, P, P), grads, basis)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one():
    grads, basis = (x.to("cuda:1") for x in arguments(5))
    got = step(torch.zeros(2, P, P, device="cuda:1"), grads, basis)
    check([x.cuda() for x in got], step(torch.zeros(2, P, P), grads.cuda(), basis.cuda()))


@pytest.mark.alone
def test_many_runs_give_the_same_bits():
    grads, basis = make(5, 6, 1024, 768, dtype=torch.bfloat16), orthogonal(768, dtype=torch.float32).cuda()
    first = None
    for _ in range(5):
        covariance = StreamingCovariance(768, 2, device="cuda")
        covariance.update([grads[0], grads[1]])
        dots = projected_dots(grads, basis, 250)
        counts = count_conflicts(grads, basis, 250)
        now = [covariance.accumulator, *dots, counts.range, counts.null]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))


def test_precision_follows_torch():
    grads, basis = arguments(20, torch.float32)
    exactly = projected_dots(grads.double(), basis.double(), RANK, impl="reference")[0]
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors[precision] = (projected_dots(grads, basis, RANK)[0] - exactly).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < errors["high"] / 100


def test_what_the_kernels_do_not_take_is_the_references():
    basis = orthogonal(8).cuda()
    for grads in (make(17, 9, 8), make(3, 9, 8, dtype=torch.float64)):
        assert torch.equal(
            count_conflicts(grads, basis, 3).range, count_conflicts(grads, basis, 3, impl="reference").range
        )
        with pytest.raises(RuntimeError, match="impl='triton' cannot run count_conflicts: "):
            count_conflicts(grads, basis, 3, impl="triton")
