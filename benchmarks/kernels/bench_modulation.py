"""Modulation of shared tokens into every task's stream, and the layer norm of the result (Section 4.3)."""

import pytest
import torch
import torch.nn.functional as F

from dtme_kernels import modulate_layer_norm

RIVALS = ["eager", "ours"]


def eager(tokens, weight, bias, norm_weight, norm_bias):
    modulated = tokens * weight[:, None, None] + bias[:, None, None]
    return modulated, F.layer_norm(modulated, modulated.shape[-1:], norm_weight, norm_bias, 1e-6)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_modulate_layer_norm(report, device, shape, backward):
    tokens = torch.randn(shape.images, shape.tokens, shape.channels, device=device)
    vectors = [torch.randn(n, shape.channels, device=device) for n in (shape.tasks, shape.tasks)]
    vectors += [torch.randn(shape.channels, device=device)] * 2
    inputs = [x.clone().requires_grad_(backward) for x in (tokens, *vectors)]
    upstream = torch.randn(shape.tasks, *tokens.shape, device=device)

    def step(function):
        outputs = function(*inputs)
        if backward:
            torch.autograd.grad(outputs, inputs, (upstream, upstream))

    def make_rivals():
        for got, want in zip(modulate_layer_norm(*inputs), eager(*(x.double() for x in inputs)), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
        return {"eager": lambda: step(eager), "ours": lambda: step(modulate_layer_norm)}

    passes = (1 + 2 * shape.tasks) * (3 if backward else 1)
    report(make_rivals, moved=passes * tokens.nbytes, operations=10 * shape.tasks * tokens.numel())
