"""Attention over shared and task keys (Section 4.3)."""

from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtme_kernels import expanded_attention

from .device import ON_GPU
from .merged_attention import merged
from .race import Rival

BACKENDS = {", flash": SDPBackend.FLASH_ATTENTION, ", cuDNN": SDPBackend.CUDNN_ATTENTION} if ON_GPU else {"": None}
RIVALS = [
    *(
        f"{rival}{backend}"
        for rival in ("concatenated", "joined before", "no task keys", "merged")
        for backend in BACKENDS
    ),
    "ours",
]


def attend(query, keys, values, backend):
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (query, keys, values))).view_as(query)


def join(shared, task):
    """Every image gets its copy of the task's keys or values."""
    return torch.cat([shared, task[:, None].expand(-1, shared.shape[1], -1, -1, -1)], -2)


def concatenated(query, key, value, task_key, task_value, backend=None):
    return attend(query, join(key, task_key), join(value, task_value), backend)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_attention(report, device, shape, backward):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    head = shape.channels // shape.heads
    size = shape.tasks, shape.images, shape.heads, shape.tokens, head
    # laid out as a projection leaves them
    shared = [
        torch.randn(*size[:2], shape.tokens, shape.heads, head, device=device).to(dtype).transpose(2, 3)
        for _ in range(3)
    ]
    task = [torch.randn(shape.tasks, shape.heads, shape.task_tokens, head, device=device).to(dtype) for _ in range(2)]
    upstream = torch.randn(shape.tasks, shape.images, shape.tokens, shape.heads, head, device=device)
    upstream = upstream.to(dtype).transpose(2, 3)

    def step(function, inputs):
        output = function(*inputs)
        return torch.autograd.grad(output, inputs, upstream) if backward else output

    @cache
    def few_exactly():
        """Of the first image of every stream: inputs, and output and gradients in float64."""
        few = [x.detach()[:, :1] for x in shared] + [x.detach() for x in task]
        wide = [x.double().requires_grad_() for x in few]
        output = concatenated(*wide)
        return few, [output, *torch.autograd.grad(output, wide, upstream[:, :1].double())]

    def check(function):
        few, want = few_exactly()
        few = [x.clone().requires_grad_() for x in few]
        output = function(*few)
        for a, b in zip([output, *torch.autograd.grad(output, few, upstream[:, :1])], want, strict=True):
            error = (a.double() - b).abs().max() / b.abs().max()
            assert error < (0.03 if ON_GPU else 1e-4), f"error {error:.2e} of the largest"

    def make_rivals():
        wanted = partial(torch.Tensor.requires_grad_, requires_grad=backward)
        own = [wanted(x) for x in (*shared, *task)]
        joined = [own[0], *(wanted(join(x, y).detach()) for x, y in zip(shared[1:], task, strict=True))]
        rivals = {"ours": Rival(partial(step, expanded_attention, own), partial(check, expanded_attention))}
        for name, backend in BACKENDS.items():
            merge, every, some = (partial(function, backend=backend) for function in (merged, concatenated, attend))
            rivals[f"merged{name}"] = Rival(partial(step, merge, own), partial(check, merge))
            rivals[f"concatenated{name}"] = Rival(partial(step, every, own), partial(check, every))
            rivals[f"joined before{name}"] = Rival(partial(step, some, joined))
            rivals[f"no task keys{name}"] = Rival(partial(step, some, own[:3]))
        return rivals

    keys = shape.tokens + shape.task_tokens
    operations = 4 * shape.tasks * shape.images * shape.tokens * keys * shape.channels * (3.5 if backward else 1)
    report(make_rivals, moved=(12 if backward else 4) * shared[0].nbytes, operations=operations)
