"""The other design for task keys: the vendor's kernel over the shared keys, the task keys merged in behind it.

Two attentions over different keys are one by their logarithms of sums. The vendor's backward, given the merged output
and logarithm, returns the right gradients of the shared keys; those of the task keys are a few small products.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from .race import compiled

aten = torch.ops.aten


class Vendor(NamedTuple):
    """One of the library's kernels: ``forward(q, k, v)`` -> output, log-sum-exp (B, H, N), and what its backward wants.

    ``backward(grad, q, k, v, output, log-sum-exp, *rest)`` -> gradients of q, k and v. All are (B, H, N, d).
    """

    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _flash_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, cumulative_q, cumulative_k, max_q, max_k, seed, offset, _ = args
    return aten._scaled_dot_product_flash_attention_backward(
        *tensors, cumulative_q, cumulative_k, max_q, max_k, 0.0, False, seed, offset
    )


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    return aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)


def _cudnn_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, cumulative_q, cumulative_k, max_q, max_k, seed, offset, _ = args
    return aten._scaled_dot_product_cudnn_attention_backward(
        *tensors, seed, offset, None, cumulative_q, cumulative_k, max_q, max_k, 0.0, False
    )


VENDORS = {
    None: Vendor(
        aten._scaled_dot_product_flash_attention_for_cpu,
        lambda *args: aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, 0.0, False),
    ),
    SDPBackend.FLASH_ATTENTION: Vendor(aten._scaled_dot_product_flash_attention, _flash_backward),
    SDPBackend.CUDNN_ATTENTION: Vendor(_cudnn_forward, _cudnn_backward),
}


def merged(
    query: Tensor, key: Tensor, value: Tensor, task_key: Tensor, task_value: Tensor, backend: SDPBackend | None = None
) -> Tensor:
    """(T, B, H, N, d) and (T, H, t, d), no mask; None is the CPU's only one."""
    return _Merged.apply(query, key, value, task_key, task_value, VENDORS[backend])


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, task_key: Tensor, task_value: Tensor, vendor: Vendor
    ) -> Tensor:
        output, logsumexp, *ctx.rest = vendor.forward(*(x.flatten(0, 1) for x in (query, key, value)))
        ctx.vendor, ctx.shape = vendor, logsumexp.shape  # some keep an axis of one behind the queries
        output, logsumexp = _merge(query, output.view_as(query), logsumexp.view(query.shape[:-1]), task_key, task_value)
        ctx.save_for_backward(query, key, value, task_key, task_value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, task_key, task_value, output, logsumexp = ctx.saved_tensors
        folded = [x.flatten(0, 1) for x in (grad, query, key, value, output)]
        found = ctx.vendor.backward(*folded, logsumexp.view(ctx.shape), *ctx.rest)
        d_query, d_key, d_value = (x.unflatten(0, query.shape[:2]) for x in found)
        return *_merge_gradients(grad, query, task_key, task_value, output, logsumexp, d_query, d_key, d_value), None


def _scores(query: Tensor, task_key: Tensor) -> Tensor:
    """(T, B, H, N, t), in float32."""
    return (query @ task_key[:, None].mT).float() * query.shape[-1] ** -0.5


@compiled
def _merge(
    query: Tensor, output: Tensor, logsumexp: Tensor, task_key: Tensor, task_value: Tensor
) -> tuple[Tensor, Tensor]:
    scores = _scores(query, task_key)
    whole = torch.logaddexp(logsumexp, scores.logsumexp(-1))
    probabilities = (scores - whole[..., None]).exp().to(query.dtype)
    shrunk = output * (logsumexp - whole).exp()[..., None]
    return (shrunk + probabilities @ task_value[:, None]).to(query.dtype), whole


@compiled
def _merge_gradients(
    grad: Tensor,
    query: Tensor,
    task_key: Tensor,
    task_value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
) -> tuple[Tensor, ...]:
    scale = query.shape[-1] ** -0.5
    p = (_scores(query, task_key) - logsumexp[..., None]).exp()
    delta = (grad.float() * output.float()).sum(-1, keepdim=True)
    ds = (p * ((grad @ task_value[:, None].mT).float() - delta)).to(query.dtype)
    d_task_key, d_task_value = (ds.mT @ query).sum(1) * scale, (p.to(query.dtype).mT @ grad).sum(1)
    return d_query + ds @ task_key[:, None] * scale, d_key, d_value, d_task_key, d_task_value
