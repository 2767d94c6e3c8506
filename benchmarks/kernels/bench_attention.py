"""Attention over shared and task keys (Section 4.3)."""

import pytest
import torch
import torch.nn.functional as F

from dtme_kernels import expanded_attention

RIVALS = ["concatenated", "ours"]


def concatenated(query, key, value, task_key, task_value):
    """Every image gets its copy of the task's keys and values."""
    rows = key.shape[1]
    keys, values = (
        torch.cat([shared, task[:, None].expand(-1, rows, -1, -1, -1)], -2).flatten(0, 1)
        for shared, task in ((key, task_key), (value, task_value))
    )
    return F.scaled_dot_product_attention(query.flatten(0, 1), keys, values).view_as(query)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_attention(report, device, shape, backward):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = shape.channels // shape.heads
    size = shape.tasks, shape.images, shape.heads, shape.tokens, head
    shared = [torch.randn(size, device=device).to(dtype) for _ in range(3)]
    task = [torch.randn(shape.tasks, shape.heads, shape.task_tokens, head, device=device).to(dtype) for _ in range(2)]
    inputs = [x.requires_grad_(backward) for x in (*shared, *task)]
    upstream = torch.randn(size, device=device).to(dtype)

    def step(function):
        output = function(*inputs)
        if backward:
            torch.autograd.grad(output, inputs, upstream)

    def make_rivals():
        few = [x.detach()[:, :1].float() for x in shared] + [x.detach().float() for x in task]
        got = expanded_attention(*(x.to(dtype) for x in few))
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            got.double(), concatenated(*(x.double() for x in few)), rtol=tolerance, atol=tolerance
        )
        return {"concatenated": lambda: step(concatenated), "ours": lambda: step(expanded_attention)}

    keys = shape.tokens + shape.task_tokens
    operations = 4 * shape.tasks * shape.images * shape.tokens * keys * shape.channels * (3.5 if backward else 1)
    report(make_rivals, moved=(12 if backward else 4) * shared[0].nbytes, operations=operations)
