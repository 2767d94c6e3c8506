"""Modulation of shared tokens into every task's stream, and the layer norm of the result (Section 4.3)."""

import pytest
import torch
import torch.nn.functional as F

from dtme_kernels import modulate_layer_norm


def eager(tokens, weight, bias, norm_weight, norm_bias):
    modulated = tokens * weight[:, None, None] + bias[:, None, None]
    return modulated, F.layer_norm(modulated, modulated.shape[-1:], norm_weight, norm_bias, 1e-6)


RIVALS = {"eager": eager, "ours": modulate_layer_norm}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("name", RIVALS)
def test_modulate_layer_norm(benchmark, shape, name, backward):
    rival = RIVALS[name]
    tokens = torch.randn(shape.images, shape.tokens, shape.channels)
    vectors = [torch.randn(n, shape.channels) for n in (shape.tasks, shape.tasks)] + [torch.randn(shape.channels)] * 2
    inputs = [x.clone().requires_grad_(backward) for x in (tokens, *vectors)]
    for got, want in zip(rival(*inputs), eager(*(x.double() for x in inputs)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(shape.tasks, *tokens.shape)

    def step():
        outputs = rival(*inputs)
        if backward:
            torch.autograd.grad(outputs, inputs, (upstream, upstream))

    benchmark(step)
