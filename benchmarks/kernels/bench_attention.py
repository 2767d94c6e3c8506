"""Attention over shared and task keys (Section 4.3)."""

import pytest
import torch
import torch.nn.functional as F

from dtme_kernels import expanded_attention


def concatenated(query, key, value, task_key, task_value):
    """Every image gets its copy of the task's keys and values."""
    rows = key.shape[1]
    keys, values = (
        torch.cat([shared, task[:, None].expand(-1, rows, -1, -1, -1)], -2).flatten(0, 1)
        for shared, task in ((key, task_key), (value, task_value))
    )
    return F.scaled_dot_product_attention(query.flatten(0, 1), keys, values).view_as(query)


RIVALS = {"concatenated": concatenated, "ours": expanded_attention}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("name", RIVALS)
def test_attention(benchmark, shape, name, backward):
    rival = RIVALS[name]
    head = shape.channels // shape.heads
    shared = [torch.randn(shape.tasks, shape.images, shape.heads, shape.tokens, head) for _ in range(3)]
    task = [torch.randn(shape.tasks, shape.heads, shape.task_tokens, head) for _ in range(2)]
    inputs = [x.requires_grad_(backward) for x in (*shared, *task)]
    want = concatenated(*(x.double() for x in inputs))
    torch.testing.assert_close(rival(*inputs).double(), want, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(shared[0].shape)

    def step():
        output = rival(*inputs)
        if backward:
            torch.autograd.grad(output, inputs, upstream)

    benchmark(step)
