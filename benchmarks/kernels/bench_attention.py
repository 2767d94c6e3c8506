"""Attention over shared and task keys (Section 4.3)."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtme_kernels import expanded_attention

from .conftest import DEVICE
from .merged_attention import merged

ON_GPU = DEVICE.type == "cuda"
BACKENDS = {", flash": SDPBackend.FLASH_ATTENTION, ", cuDNN": SDPBackend.CUDNN_ATTENTION} if ON_GPU else {"": None}
RIVALS = [
    *(f"{rival}{backend}" for rival in ("concatenated", "joined before", "no task keys") for backend in BACKENDS),
    *("merged", "ours"),
]


def attend(query, keys, values, backend):
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (query, keys, values))).view_as(query)


def runs(backend, shared):
    """Whether this build of torch has the backend, for this GPU and these tensors."""
    try:
        attend(*(x.detach()[:, :1] for x in shared), backend)
    except RuntimeError:
        return False
    return True


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
        if backward:
            torch.autograd.grad(output, inputs, upstream)

    def make_rivals():
        wanted = partial(torch.Tensor.requires_grad_, requires_grad=backward)
        own = [wanted(x) for x in (*shared, *task)]
        joined = [own[0], *(wanted(join(x, y).detach()) for x, y in zip(shared[1:], task, strict=True))]
        rivals = {"merged": partial(step, merged, own), "ours": partial(step, expanded_attention, own)}
        for name, backend in BACKENDS.items():
            if backend and not runs(backend, shared):
                continue
            rivals[f"concatenated{name}"] = partial(step, partial(concatenated, backend=backend), own)
            rivals[f"joined before{name}"] = partial(step, partial(attend, backend=backend), joined)
            rivals[f"no task keys{name}"] = partial(step, partial(attend, backend=backend), own[:3])
        few = [x.detach()[:, :1] for x in shared] + [x.detach() for x in task]
        exactly = [x.double().requires_grad_() for x in few]
        want = concatenated(*exactly)
        want = [want, *torch.autograd.grad(want, exactly, upstream[:, :1].double())]
        for function in (merged, expanded_attention):
            few = [x.detach().requires_grad_() for x in few]
            got = function(*few)
            got = [got, *torch.autograd.grad(got, few, upstream[:, :1])]
            for a, b in zip(got, want, strict=True):
                assert (a.double() - b).abs().max() < (0.03 if ON_GPU else 1e-4) * b.abs().max(), function
        return {name: rivals[name] for name in RIVALS if name in rivals}

    keys = shape.tokens + shape.task_tokens
    operations = 4 * shape.tasks * shape.images * shape.tokens * keys * shape.channels * (3.5 if backward else 1)
    report(make_rivals, moved=(12 if backward else 4) * shared[0].nbytes, operations=operations)
