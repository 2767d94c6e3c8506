"""The same bits, run after run: outputs and gradients."""

import pytest
import torch

from dtme_kernels import (
    count_conflicts,
    expanded_attention,
    modulate,
    modulate_concat_attention,
    modulate_layer_norm,
    projected_dots,
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
