"""Triton: gradients of the projected dots."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device


@triton.jit(do_not_specialize=["num_tokens", "rank"])
def _mix(h, weights, num_tokens, p, rank, K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """h[i] = sum over j of w_ij h[j] in place, w the range weights (pair, token) for c < rank, the null ones above."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    channel = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    mask = (token < num_tokens)[:, None] & (channel < p)[None, :]
    below = (channel < rank)[None, :]
    pointer = h + token[:, None] * p + channel[None, :]
    stride_task = tl.cast(num_tokens, tl.int64) * p
    b_h = ()
    for task in tl.static_range(K):
        b_h += (tl.load(pointer + task * stride_task, mask, 0.0),)  # [BT, BC]
    for i in range(K):
        b_sum = tl.zeros([BT, BC], tl.float32)
        for j in tl.static_range(K):
            another = token < tl.where(i == j, 0, num_tokens)
            pair = _pair(tl.minimum(i, j), tl.maximum(i, j), K)
            weight = weights + pair * tl.cast(num_tokens, tl.int64) + token
            b_range = tl.load(weight, another, 0.0)[:, None]
            b_null = tl.load(weight + tl.cast(num_tokens, tl.int64) * (K * (K - 1) // 2), another, 0.0)[:, None]
            b_sum += tl.where(below, b_range, b_null) * b_h[j]
        tl.store(pointer + i * stride_task, b_sum, mask)


@triton.jit
def _pair(i, j, K: tl.constexpr):
    """The index of i < j in itertools.combinations(range(K), 2)."""
    return i * (2 * K - i - 1) // 2 + j - i - 1


def projected_dots_backward(
    grad_range: Tensor, grad_null: Tensor, grads: Tensor, basis: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """dh_i = sum_j w_ij h_j, then dg = U dh and dU = g dh^T: large products, which are the library's."""
    num_tasks, *lead, p = grads.shape
    g, u = grads.reshape(-1, p).float(), basis.float()
    h = g @ u
    if h.numel():
        num_tokens, block_t, block_c = math.prod(lead), 16, 64
        weights = torch.stack([grad_range, grad_null])
        with on_device(h):
            grid = (triton.cdiv(num_tokens, block_t), triton.cdiv(p, block_c))
            _mix[grid](h, weights, num_tokens, p, rank, K=num_tasks, BT=block_t, BC=block_c)
    return (h @ u.mT).to(grads.dtype).view(grads.shape), (g.mT @ h).to(basis.dtype)
