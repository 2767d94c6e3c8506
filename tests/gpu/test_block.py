"""The operations of an expanded block in a training loop and at real sizes."""

import pytest
import torch
import torch.nn.functional as F

from dtme_kernels import expanded_attention, modulate, modulate_concat_attention, modulate_layer_norm
from dtme_kernels.testing import assert_accurate, make
from tests.gpu.memory import peak_bytes

P, HEADS = 192, 3
LOW = [torch.bfloat16, torch.float16]


def arguments(batch=8, streams=4, tokens=197, p=P, dtype=torch.bfloat16, grad=True):
    """Of modulate_concat_attention, positional ones first."""
    shapes = [(batch, tokens, p), (streams, p), (streams, p), (streams, 6, p), (p,), (p,), (3 * p, p), (3 * p,)]
    args = [make(*shape, dtype=dtype, seed=s) for s, shape in enumerate(shapes)]
    args[6] *= p**-0.5
    return [x.requires_grad_(grad) for x in args]


def block(tokens, weight, bias, task_tokens, norm_weight, norm_bias, qkv_weight, qkv_bias, impl="auto"):
    options = {"norm_weight": norm_weight, "norm_bias": norm_bias, "qkv_weight": qkv_weight, "qkv_bias": qkv_bias}
    heads = tokens.shape[-1] // 64
    return modulate_concat_attention(tokens, weight, bias, task_tokens, **options, num_heads=heads, impl=impl)


def step(*args):
    attended, modulated = block(*args)
    return attended, modulated, modulate(modulated, *args[1:3])


def gradients(outputs, leaves):
    return torch.autograd.grad(sum(x.float().square().sum() for x in outputs), leaves)


def close(got, want, tolerance=0.05):
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_block_is_as_right_as_concatenation(dtype):
    args = arguments(dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in args]
    results = []
    for tensors, impl in ((args, "triton"), (wide, "reference"), (args, "reference")):
        outputs = block(*tensors, impl=impl)
        results.append([*outputs, *gradients(outputs, tensors)])
    for got, want, plain in zip(*results, strict=True):
        assert_accurate(got, want.detach().cpu(), plain, terms=8 * 197 if dtype == torch.float32 else 1)


def test_one_graph_for_every_batch_size_and_task_set():
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch, streams in ((8, 4), (9, 4), (13, 5), (5, 3)):
        args = arguments(batch, streams)
        with torch._dynamo.config.patch(error_on_recompile=(batch, streams) != (8, 4)):
            got = compiled(*args)
        want = step(*args)
        close(got, want)
        close(gradients(got, args), gradients(want, args))


def test_one_kernel_for_every_batch():
    from dtme_kernels.attention import kernel as attention
    from dtme_kernels.modulation import kernel as modulation

    def compiled():
        kernels = (attention.attend, attention.query_gradients, attention.key_gradients)
        kernels += (modulation._modulate, modulation._modulate_backward)
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    args = arguments(8)
    gradients(step(*args), args)
    before = compiled()
    for batch in (2, 5, 16, 17):
        args = arguments(batch)
        gradients(step(*args), args)
    assert compiled() == before


def test_nothing_waits_for_the_host():
    args = arguments()
    gradients(step(*args), args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(step(*args), args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_of_a_training_step():
    args = arguments()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd's first run, off the graph, as torch asks
        gradients(step(*args), args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*args)
        captured = [*outputs, *gradients(outputs, args)]
    for seed in (10, 20):
        with torch.no_grad():
            args[0].copy_(make(*args[0].shape, seed=seed))
        graph.replay()
        outputs = step(*args)
        for a, b in zip(captured, [*outputs, *gradients(outputs, args)], strict=True):
            assert torch.equal(a, b)


@pytest.mark.alone
def test_many_runs_give_the_same_bits():
    args = arguments(6, 5, 1024, 768)
    first = None
    for _ in range(5):
        outputs = step(*args)
        now = [*outputs, *gradients(outputs, args)]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))


def test_autocast():
    args = arguments(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        attended, modulated = block(*args)
    assert (attended.dtype, modulated.dtype) == (torch.bfloat16, torch.float32)
    close([attended.float(), modulated], block(*args))
    assert all(x.dtype == torch.float32 for x in gradients((attended, modulated), args))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one():
    args = [x.detach().to("cuda:1").requires_grad_() for x in arguments()]
    outputs = step(*args)
    assert all(x.isfinite().all() for x in (*outputs, *gradients(outputs, args)))


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("d", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_of_every_head_dimension(d, is_causal, dtype):
    if dtype == torch.float32 and d > 64:
        pytest.skip("the reference's")
    shared = [torch.randn(2, 2, 4, 777, d) for _ in range(3)]
    task = [torch.randn(2, 4, 6, d) for _ in range(2)]
    results = []
    for kind, impl in ((dtype, "triton"), (torch.float64, "reference"), (dtype, "reference")):
        tensors = [x.to(dtype).to(kind).requires_grad_() for x in (*shared, *task)]
        output = expanded_attention(*tensors, is_causal=is_causal, impl=impl)
        results.append([output, *gradients([output], tensors)])
    for got, want, plain in zip(*results, strict=True):
        assert_accurate(got, want.detach().cpu(), plain, terms=777 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize(("streams", "p"), [(5, 768), (11, 768), (3, 1280), (2, 4096), (5, 192)])
def test_modulation_of_real_widths(streams, p, dtype):
    shapes = [(6, 1024, p), (streams, p), (streams, p), (p,), (p,)]
    results = []
    for kind, impl in ((dtype, "triton"), (torch.float64, "reference"), (dtype, "reference")):
        tensors = [make(*s, dtype=dtype, seed=i).to(kind).requires_grad_() for i, s in enumerate(shapes)]
        outputs = modulate_layer_norm(*tensors, impl=impl)
        results.append([*outputs, *gradients(outputs, tensors)])
    for got, want, plain in zip(*results, strict=True):
        assert_accurate(got, want.detach().cpu(), plain, terms=6144 * streams if dtype == torch.float32 else 1)


@pytest.mark.alone
def test_offsets_past_two_to_the_31():
    rows, p = 2**31 // 768 + 1000, 768
    tokens = torch.zeros(1, rows, p, dtype=torch.bfloat16)
    tokens[:, -50:] = torch.randn(50, p)
    vectors = [torch.randn(*shape) for shape in ((1, p), (1, p), (p,), (p,))]
    got = modulate_layer_norm(tokens, *vectors, impl="triton")
    want = modulate_layer_norm(tokens[:, -50:], *vectors)
    assert all(torch.equal(a[:, :, -50:], b) for a, b in zip(got, want, strict=True))
    del got
    far = torch.zeros(1, 2**31 // 64 + 256, 1, 1, 64, dtype=torch.bfloat16)  # one query and key an image
    far[:, -9:] = torch.randn(9, 1, 1, 64)
    task = [torch.randn(1, 1, 6, 64, dtype=torch.bfloat16) for _ in range(2)]
    got = expanded_attention(far, far, far, *task, impl="triton")
    assert torch.equal(got[:, -9:], expanded_attention(*[far[:, -9:].clone()] * 3, *task))


@pytest.mark.alone
def test_memory_of_attention_is_its_output_and_statistics():
    shared = [torch.randn(5, 6, 1024, 12, 64, dtype=torch.bfloat16).transpose(2, 3) for _ in range(3)]
    task = [torch.randn(5, 12, 6, 64, dtype=torch.bfloat16) for _ in range(2)]
    output = expanded_attention(*shared, *task, impl="triton")
    statistics = 2 * 4 * 5 * 6 * 12 * 1024
    assert peak_bytes(lambda: expanded_attention(*shared, *task, impl="triton")) <= 1.01 * (output.nbytes + statistics)


def test_nothing_is_left_unwritten():
    """The allocator hands out memory full of NaN."""
    args = arguments(3, 4, 33)
    blocks = [torch.full((2**22,), float("nan")) for _ in range(8)]
    del blocks
    outputs = step(*args)
    found = [*outputs, *gradients(outputs, args)]
    assert all(x.isfinite().all() for x in found)


def test_what_the_kernels_do_not_take_is_the_references():
    shared, task = [torch.randn(1, 2, 2, 9, 257) for _ in range(3)], [torch.randn(1, 2, 3, 257) for _ in range(2)]
    keys = [torch.cat([x, y[:, None].expand(-1, 2, -1, -1, -1)], -2) for x, y in zip(shared[1:], task, strict=True)]
    torch.testing.assert_close(expanded_attention(*shared, *task), F.scaled_dot_product_attention(shared[0], *keys))
    with pytest.raises(RuntimeError, match="channels a head at most"):
        expanded_attention(*shared, *task, impl="triton")
    with pytest.raises(RuntimeError, match="4096 channels at most, got 5000"):
        modulate(torch.randn(1, 2, 5000), torch.ones(2, 5000), torch.ones(2, 5000), impl="triton")
