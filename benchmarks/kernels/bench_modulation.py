"""Modulation of shared tokens into every task's stream, and the layer norm of the result (Section 4.3)."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from dtme_kernels import modulate_layer_norm
from dtme_kernels.modulation import reference

from .device import ON_GPU
from .race import Rival, compiled

RIVALS = ["eager", "compiled", "copy", "ours"]


def eager(tokens, weight, bias, norm_weight, norm_bias):
    """In the dtype of the tokens."""
    vectors = [x.to(tokens.dtype) for x in (weight, bias, norm_weight, norm_bias)]
    modulated = tokens * vectors[0][:, None, None] + vectors[1][:, None, None]
    return modulated, F.layer_norm(modulated, modulated.shape[-1:], *vectors[2:], 1e-6)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_modulate_layer_norm(report, device, shape, backward):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    tokens = torch.randn(shape.images, shape.tokens, shape.channels, device=device).to(dtype)
    vectors = [torch.randn(n, shape.channels, device=device) for n in (shape.tasks, shape.tasks)]
    vectors += [torch.randn(shape.channels, device=device)] * 2
    inputs = [x.clone().requires_grad_(backward) for x in (tokens, *vectors)]
    upstream = torch.randn(shape.tasks, *tokens.shape, device=device).to(dtype)
    # read the tokens and write both streams; backward read the tokens and both gradients, and write one
    passes = 1 + 2 * shape.tasks + (2 + 2 * shape.tasks if backward else 0)

    def step(function):
        outputs = function(*inputs)
        return torch.autograd.grad(outputs, inputs, (upstream, upstream)) if backward else outputs

    @cache
    def exact():
        wide = [x.detach().double().requires_grad_(backward) for x in inputs]
        outputs = eager(*wide)
        return torch.autograd.grad(outputs, wide, (upstream.double(),) * 2) if backward else outputs

    def check(function):
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        for got, want in zip(step(function), exact(), strict=True):
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error <= tolerance, f"error {error:.2e} of the largest"

    def make_rivals():
        source, target = (torch.ones(passes * tokens.numel() // 2, device=device, dtype=dtype) for _ in range(2))
        by_compiler = compiled(reference.modulate_layer_norm)
        return {
            "eager": Rival(partial(step, eager)),
            "compiled": Rival(partial(step, by_compiler), partial(check, by_compiler)),
            "copy": Rival(partial(target.copy_, source)),  # of as many bytes
            "ours": Rival(partial(step, modulate_layer_norm), partial(check, modulate_layer_norm)),
        }

    report(make_rivals, moved=passes * tokens.nbytes, operations=10 * shape.tasks * tokens.numel())
