"""The same bits, run after run, and in C++ on any number of threads: outputs and gradients."""

import pytest
import torch

from dtme_kernels import (
    count_conflicts,
    expanded_attention,
    modulate,
    modulate_concat_attention,
    modulate_layer_norm,
    projected_dots,
    registry,
    split_token_space,
    token_covariance,
    token_covariance_,
)
from dtme_kernels.testing import make

TOKENS, STREAMS, P = (4, 50, 32), (3, 32), 32
QKV, TASK_KV = (3, 4, 2, 50, 16), (3, 2, 6, 16)
NORM = [(P,), (P,)]


def accumulate(*layers):
    return token_covariance_(torch.zeros(len(layers), P, P, dtype=torch.float64), layers)


def split(tokens):
    space = split_token_space(token_covariance(tokens))
    return space.basis, space.eigenvalues


def count(grads, basis):
    counts = count_conflicts(grads, basis, 8)
    return counts.range, counts.null, counts.valid


def block(*args):
    names = ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias")
    return modulate_concat_attention(*args[:4], **dict(zip(names, args[4:], strict=True)), num_heads=4)


CASES = {
    token_covariance: [TOKENS],
    accumulate: [TOKENS, (4, 51, P), (4, 52, P)],
    split: [TOKENS],
    count: [(4, *TOKENS), (P, P)],
    lambda grads, basis: projected_dots(grads, basis, 8): [(4, *TOKENS), (P, P)],
    modulate: [TOKENS, STREAMS, STREAMS],
    modulate_layer_norm: [TOKENS, STREAMS, STREAMS, *NORM],
    expanded_attention: [QKV, QKV, QKV, TASK_KV, TASK_KV],
    block: [TOKENS, STREAMS, STREAMS, (3, 6, P), *NORM, (3 * P, P), (3 * P,)],
}


def run(function, shapes):
    args = [make(*shape, seed=s, requires_grad=True) for s, shape in enumerate(shapes)]
    outputs = function(*args)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    if outputs[0].requires_grad:
        sum(out.square().sum() for out in outputs).backward()
    return [*outputs, *(x.grad for x in args if x.grad is not None)]


@pytest.mark.parametrize(("function", "shapes"), CASES.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_two_runs_give_the_same_bits(function, shapes):
    for first, second in zip(run(function, shapes), run(function, shapes), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(registry.cpp_module is None, reason="the extension is not built")
@pytest.mark.parametrize(
    ("function", "shapes"),
    [case for case in CASES.items() if case[0] not in (split, block)],  # those run the library's products too
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_any_number_of_threads_gives_the_same_bits(function, shapes):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(function, shapes))
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.skipif(registry.cpp_module is None, reason="the extension is not built")
def test_threads_do_not_change_counts_of_many_tokens():
    """Enough tokens for several blocks and for signs in doubt."""
    grads = make(5, 3000, 64)
    basis = torch.linalg.qr(make(64, 64, dtype=torch.float64, seed=1)).Q
    grads = grads * torch.where(torch.arange(64) < 20, 300.0, 1.0) @ basis.T.float()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(count_conflicts(grads, basis, 20))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].range, found[1].range)
    assert torch.equal(found[0].null, found[1].null)
