"""Triton: attention over shared keys and, in the same online softmax, over the task keys of a stream.

The fewest operations are ``4 T B H N (S + t) d`` forward and ``10 T B H N (S + t) d`` backward; the fewest bytes one
read of query, key and value and one write of the output. Task keys are read where they are, by every image: a second
loop over them follows the loop over the shared keys, and nothing is concatenated or repeated. Backward, one kernel
walks over the keys for a block of queries, another over the queries for a block of keys: two products more, and in
return every sum has one owner and a fixed order. The first of them also meets all task keys; what its block of queries
has of their gradients it leaves as a partial sum, and the partial sums are added over images, heads and blocks.

Scores are kept in units of log 2. Of every query the forward leaves the greatest score and the sum of the exponentials;
a query that sees no key has +inf and 1, so that every probability found again from them is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .tiles import tile

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(start, row, stride, rows, D: tl.constexpr, BD: tl.constexpr, BOUNDED: tl.constexpr):
    """[rows, BD] of a matrix with D contiguous channels, zeros outside."""
    channel = tl.arange(0, BD)[None, :]
    place = start + row.to(tl.int64)[:, None] * stride + channel
    if BOUNDED:
        return tl.load(place, (row < rows)[:, None] & (channel < D), 0.0)
    if D < BD:
        return tl.load(place, channel < D, 0.0)
    return tl.load(place)


@triton.jit
def _store(start, row, stride, rows, b_x, D: tl.constexpr, BD: tl.constexpr):
    channel = tl.arange(0, BD)[None, :]
    place = start + row.to(tl.int64)[:, None] * stride + channel
    tl.store(place, b_x, (row < rows)[:, None] & (channel < D))


@triton.jit
def _mask(b_s, scale, mask, strides, row, column, rows, columns, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Hide what is not visible. Scores as the product left them, or, with an additive mask, times ``scale``.

    row and column: of the scores, shaped to broadcast to them either way round.
    """
    if MASK != "":
        place = mask + row.to(tl.int64) * strides[3] + column.to(tl.int64) * strides[4]
        inside = (row < rows) & (column < columns)
        if MASK == "bool":
            b_s = tl.where(tl.load(place, inside, 0) != 0, b_s, float("-inf"))
        else:
            b_s = b_s * scale + tl.load(place, inside, 0.0).to(tl.float32) * LOG2E
    b_s = tl.where(column < columns, b_s, float("-inf"))
    if CAUSAL:
        b_s = tl.where(column <= row, b_s, float("-inf"))
    return b_s


@triton.jit
def _statistics(statistics, place, all_rows, inside, EXACT: tl.constexpr):
    """What to subtract from a score, and what to multiply its exponential by, to have a probability.

    Their sum rounds, which float32 would notice: there the two stay apart.
    """
    b_most = tl.load(statistics + place, inside, float("inf"))
    b_sum = tl.load(statistics + all_rows + place, inside, 1.0)
    if EXACT:
        return b_most, 1.0 / b_sum
    return b_most + tl.log2(b_sum), b_sum


@triton.jit
def _span(
    part, first, keys, task_keys, CHECKED: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Keys of a part of the loop for BM queries from ``first``: 0, all visible; 1, to be looked at; 2, task keys."""
    low, high = keys // BN * BN, keys
    if CAUSAL:
        low, high = tl.minimum(keys, first + 1) // BN * BN, tl.minimum(keys, first + BM)
    if CHECKED:
        low = 0
    begin = low if part == 1 else 0
    end = low if part == 0 else high if part == 1 else task_keys
    return begin, end


@triton.jit
def _place(BLOCKS, sizes, CAUSAL: tl.constexpr):
    """Block, head and row (stream and image) of a program; under a causal mask the longest loops start first."""
    block, rest = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    if CAUSAL:
        block = BLOCKS - 1 - block
    return block, rest % sizes[1], (rest // sizes[1]).to(tl.int64)


@triton.jit
def _attend_part(
    b_q,
    b_out,
    b_sum,
    b_most,
    k,
    k_stride,
    v,
    v_stride,
    begin,
    end,
    m,
    queries,
    scale,
    mask,
    mask_strides,
    PART: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Take the keys from begin to end into the online softmax."""
    unit = 1.0 if MASK == "additive" else scale
    for first in range(begin, end, BN):
        n = first + tl.arange(0, BN)  # [BN]
        b_k = _load(k, n, k_stride, end, D, BD, PART > 0)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if PART > 0:
            b_s = _mask(b_s, scale, mask, mask_strides, m[:, None], n[None, :], queries, end, MASK, CAUSAL)
        b_new = tl.maximum(b_most, tl.max(b_s, 1) * unit)
        # while nothing is visible, -inf is the most: its place is taken by a number that makes exp2 give 0
        b_at = tl.where(b_new == float("-inf"), 0.0, b_new) if MASK != "" else b_new
        b_p = tl.exp2(b_s * unit - b_at[:, None])
        b_shrink = tl.exp2(b_most - b_at)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = _load(v, n, v_stride, end, D, BD, PART > 0)  # [BN, BD]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision=PRECISION)
        b_most = b_new
    return b_out, b_sum, b_most


@triton.jit(do_not_specialize=["all_rows", "sizes"])
def _attend(
    query,
    key,
    value,
    task_key,
    task_value,
    mask,
    output,
    statistics,
    all_rows,
    scale,
    sizes,
    q_strides,
    k_strides,
    v_strides,
    task_k_strides,
    task_v_strides,
    mask_strides,
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """output[row, queries, head] for BM queries. sizes: images, heads, heads a key head, queries, keys, task keys."""
    queries = sizes[3]
    block, head, row = _place(tl.cdiv(queries, BM), sizes, CAUSAL)
    stream, image, key_head = row // sizes[0], row % sizes[0], (head // sizes[2]).to(tl.int64)
    m = block * BM + tl.arange(0, BM)  # [BM]
    b_q = _load(query + row * q_strides[0] + head.to(tl.int64) * q_strides[1], m, q_strides[2], queries, D, BD, True)
    mask += stream * mask_strides[0] + image * mask_strides[1] + head.to(tl.int64) * mask_strides[2]
    b_out = tl.zeros([BM, BD], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_most = tl.full([BM], float("-inf"), tl.float32)
    for part in tl.static_range(1 if MASK != "" else 0, 3):
        k, k_stride = key + row * k_strides[0] + key_head * k_strides[1], k_strides[2]
        v, v_stride = value + row * v_strides[0] + key_head * v_strides[1], v_strides[2]
        if part == 2:
            k, k_stride = task_key + stream * task_k_strides[0] + key_head * task_k_strides[1], task_k_strides[2]
            v, v_stride = task_value + stream * task_v_strides[0] + key_head * task_v_strides[1], task_v_strides[2]
        begin, end = _span(part, block * BM, sizes[4], sizes[5], MASK != "", CAUSAL, BM, BN)
        b_out, b_sum, b_most = _attend_part(
            b_q, b_out, b_sum, b_most, k, k_stride, v, v_stride, begin, end, m, queries, scale, mask, mask_strides,
            part, D, MASK if part == 1 else "", CAUSAL and part == 1, PRECISION, BT if part == 2 else BN, BD,
        )  # fmt: skip
    b_out /= tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    stride = sizes[1].to(tl.int64) * D
    _store(output + row * queries * stride + head * D, m, stride, queries, b_out, D, BD)
    vector = (row * sizes[1] + head) * queries + m
    tl.store(statistics + vector, tl.where(b_sum == 0.0, float("inf"), b_most), m < queries)
    tl.store(statistics + all_rows + vector, tl.where(b_sum == 0.0, 1.0, b_sum), m < queries)


@triton.jit
def _query_part(
    b_q,
    b_do,
    b_delta,
    b_at,
    b_share,
    b_dq,
    k,
    k_stride,
    v,
    v_stride,
    begin,
    end,
    m,
    queries,
    scale,
    mask,
    mask_strides,
    d_k,
    d_v,
    PART: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """dQ, but for the scale, += dS K over the keys from begin to end; of task keys also d_k = dS^T Q, d_v = P^T dO."""
    unit = 1.0 if MASK == "additive" else scale
    for first in range(begin, end, BN):
        n = first + tl.arange(0, BN)  # [BN]
        b_k = _load(k, n, k_stride, end, D, BD, PART > 0)  # [BN, BD]
        b_v = _load(v, n, v_stride, end, D, BD, PART > 0)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if PART > 0:
            b_s = _mask(b_s, scale, mask, mask_strides, m[:, None], n[None, :], queries, end, MASK, CAUSAL)
        b_p = tl.exp2(b_s * unit - b_at[:, None])
        if EXACT:
            b_p *= b_share[:, None]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
        if PART == 2:
            b_dv = tl.dot(tl.trans(b_p.to(b_v.dtype)), b_do, input_precision=PRECISION)  # [BN, BD]
            _store(d_v, n, D, end, b_dv, D, BD)
            b_dk = tl.dot(tl.trans(b_ds), b_q, input_precision=PRECISION)
            _store(d_k, n, D, end, b_dk * (scale / LOG2E), D, BD)
    return b_dq


@triton.jit(do_not_specialize=["all_rows", "sizes"])
def _query_gradients(
    grad,
    query,
    key,
    value,
    task_key,
    task_value,
    mask,
    output,
    statistics,
    d_query,
    d_task_key,
    d_task_value,
    delta,
    all_rows,
    scale,
    sizes,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    task_k_strides,
    task_v_strides,
    mask_strides,
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """dQ and delta = rowsum(dO O) of BM queries; what they have of dK and dV of the task keys, a partial sum."""
    queries = sizes[3]
    blocks = tl.cdiv(queries, BM)
    block, head, row = _place(blocks, sizes, CAUSAL)
    stream, image, key_head = row // sizes[0], row % sizes[0], (head // sizes[2]).to(tl.int64)
    m = block * BM + tl.arange(0, BM)  # [BM]
    b_q = _load(query + row * q_strides[0] + head.to(tl.int64) * q_strides[1], m, q_strides[2], queries, D, BD, True)
    grad += row * grad_strides[0] + head.to(tl.int64) * grad_strides[1]
    b_do = _load(grad, m, grad_strides[2], queries, D, BD, True)
    mask += stream * mask_strides[0] + image * mask_strides[1] + head.to(tl.int64) * mask_strides[2]
    stride = sizes[1].to(tl.int64) * D
    b_o = _load(output + row * queries * stride + head * D, m, stride, queries, D, BD, True)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)  # [BM]
    vector = (row * sizes[1] + head) * queries + m
    tl.store(delta + vector, b_delta, m < queries)
    b_at, b_share = _statistics(statistics, vector, all_rows, m < queries, EXACT)
    b_dq = tl.zeros([BM, BD], tl.float32)
    partial = ((row * sizes[1] + head) * blocks + block) * sizes[5] * D
    for part in tl.static_range(1 if MASK != "" else 0, 3):
        k, k_stride = key + row * k_strides[0] + key_head * k_strides[1], k_strides[2]
        v, v_stride = value + row * v_strides[0] + key_head * v_strides[1], v_strides[2]
        if part == 2:
            k, k_stride = task_key + stream * task_k_strides[0] + key_head * task_k_strides[1], task_k_strides[2]
            v, v_stride = task_value + stream * task_v_strides[0] + key_head * task_v_strides[1], task_v_strides[2]
        begin, end = _span(part, block * BM, sizes[4], sizes[5], MASK != "", CAUSAL, BM, BN)
        b_dq = _query_part(
            b_q, b_do, b_delta, b_at, b_share, b_dq, k, k_stride, v, v_stride, begin, end, m, queries, scale,
            mask, mask_strides, d_task_key + partial, d_task_value + partial,
            part, D, MASK if part == 1 else "", CAUSAL and part == 1, EXACT, PRECISION, BT if part == 2 else BN, BD,
        )  # fmt: skip
    start = d_query + (row * sizes[1] + head) * queries * D
    _store(start, m, D, queries, b_dq * (scale / LOG2E), D, BD)


@triton.jit(do_not_specialize=["all_rows", "sizes"])
def _key_gradients(
    grad,
    query,
    key,
    value,
    mask,
    statistics,
    delta,
    d_key,
    d_value,
    all_rows,
    scale,
    sizes,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """dK and dV of BN shared keys, summed over the query heads that share them. sizes[1]: of the keys' heads."""
    queries, keys = sizes[3], sizes[4]
    key_heads = sizes[1] // sizes[2]
    blocks = tl.cdiv(keys, BN)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    key_head, row = rest % key_heads, (rest // key_heads).to(tl.int64)
    stream, image = row // sizes[0], row % sizes[0]
    n = block * BN + tl.arange(0, BN)  # [BN]
    b_k = _load(key + row * k_strides[0] + key_head.to(tl.int64) * k_strides[1], n, k_strides[2], keys, D, BD, True)
    b_v = _load(value + row * v_strides[0] + key_head.to(tl.int64) * v_strides[1], n, v_strides[2], keys, D, BD, True)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    unit = 1.0 if MASK == "additive" else scale
    begin = block * BN // BM * BM if CAUSAL else 0
    for head in range(key_head * sizes[2], (key_head + 1) * sizes[2]):
        own = tl.cast(head, tl.int64)
        q, do = query + row * q_strides[0] + own * q_strides[1], grad + row * grad_strides[0] + own * grad_strides[1]
        own_mask = mask + stream * mask_strides[0] + image * mask_strides[1] + own * mask_strides[2]
        vector = (row * sizes[1] + head) * queries
        for first in range(begin, queries, BM):
            m = first + tl.arange(0, BM)  # [BM]
            b_q = _load(q, m, q_strides[2], queries, D, BD, True)  # [BM, BD]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
            if MASK != "" or CAUSAL:
                b_s = _mask(b_s, scale, own_mask, mask_strides, m[None, :], n[:, None], queries, keys, MASK, CAUSAL)
            b_at, b_share = _statistics(statistics, vector + m, all_rows, m < queries, EXACT)
            b_p = tl.exp2(b_s * unit - b_at[None, :])
            if EXACT:
                b_p *= b_share[None, :]
            b_do = _load(do, m, grad_strides[2], queries, D, BD, True)  # [BM, BD]
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_delta = tl.load(delta + vector + m, m < queries, 0.0)
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
            b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
    start = (row * key_heads + key_head) * keys * D
    _store(d_key + start, n, D, keys, b_dk * (scale / LOG2E), D, BD)
    _store(d_value + start, n, D, keys, b_dv, D, BD)


@triton.jit(do_not_specialize=["all_rows", "sizes", "kept"])
def _mask_gradients(
    grad,
    query,
    key,
    value,
    mask,
    statistics,
    delta,
    d_mask,
    all_rows,
    scale,
    sizes,
    kept,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One tile of dS, summed over the streams, images and heads that share the mask: ``kept`` are those that do not."""
    queries, keys = sizes[3], sizes[4]
    blocks, own = tl.cdiv(queries, BM), tl.program_id(1)
    m = tl.program_id(0) % blocks * BM + tl.arange(0, BM)  # [BM]
    n = tl.program_id(0) // blocks * BN + tl.arange(0, BN)  # [BN]
    own_stream, own_image, own_head = own // (kept[1] * kept[2]), own // kept[2] % kept[1], own % kept[2]
    images, heads = sizes[0] // kept[1], sizes[1] // kept[2]  # that share
    b_sum = tl.zeros([BM, BN], tl.float32)
    for i in range(sizes[6] // kept[0] * images * heads):
        image, head = own_image + i // heads % images, own_head + i % heads
        stream = (own_stream + i // (images * heads)).to(tl.int64)
        row, key_head = stream * sizes[0] + image, (head // sizes[2]).to(tl.int64)
        head = head.to(tl.int64)
        b_q = _load(query + row * q_strides[0] + head * q_strides[1], m, q_strides[2], queries, D, BD, True)
        b_k = _load(key + row * k_strides[0] + key_head * k_strides[1], n, k_strides[2], keys, D, BD, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        own_mask = mask + stream * mask_strides[0] + image.to(tl.int64) * mask_strides[1] + head * mask_strides[2]
        b_s = _mask(b_s, scale, own_mask, mask_strides, m[:, None], n[None, :], queries, keys, MASK, False)
        vector = (row * sizes[1] + head) * queries + m
        b_at, b_share = _statistics(statistics, vector, all_rows, m < queries, EXACT)
        b_p = tl.exp2(b_s - b_at[:, None])
        if EXACT:
            b_p *= b_share[:, None]
        b_do = _load(grad + row * grad_strides[0] + head * grad_strides[1], m, grad_strides[2], queries, D, BD, True)
        b_v = _load(value + row * v_strides[0] + key_head * v_strides[1], n, v_strides[2], keys, D, BD, True)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_sum += b_p * (b_dp - tl.load(delta + vector, m < queries, 0.0)[:, None])
    place = d_mask + (own.to(tl.int64) * queries + m)[:, None] * keys + n[None, :]
    tl.store(place, b_sum, (m < queries)[:, None] & (n < keys)[None, :])


class _Problem:
    """The tensors as the kernels take them: streams and images in one axis, channels side by side."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        task_key: Tensor,
        task_value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> None:
        self.lead = query.shape[:-3]
        self.rows, self.images = self.lead.numel(), query.shape[-4]
        _, self.heads, self.queries, self.channels = self.fold(query).shape
        self.key_heads, self.keys, self.task_keys = key.shape[-3], key.shape[-2], task_key.shape[-2]
        self.all_rows = self.rows * self.heads * self.queries  # the sums lie behind the greatest scores
        scale = self.channels**-0.5 if scale is None else scale
        # the kernels take the greatest score for the greatest after scaling, and 0 times a hidden score must hide it
        self.sign = -1.0 if scale < 0 else 1.0
        self.scale = max(abs(scale) * LOG2E.value, 1e-30)
        query = query if scale >= 0 else -query
        self.shared = [self.fold(x) for x in (query, key, value)]
        self.task = [_aligned(x if x.dim() == 4 else x[None]) for x in (task_key, task_value)]
        self.sizes = (self.images, self.heads, self.heads // self.key_heads, self.queries, self.keys, self.task_keys)
        self.mask, self.mask_strides, self.kind = query, (0, 0, 0, 0, 0), ""
        if attn_mask is not None:
            full = (*(self.lead if len(self.lead) == 2 else (1, *self.lead)), self.heads, self.queries, self.keys)
            attn_mask = attn_mask.expand(full)
            self.kind = "bool" if attn_mask.dtype == torch.bool else "additive"
            self.mask, self.mask_strides = attn_mask, attn_mask.stride()
            if self.kind == "bool":
                self.mask = attn_mask.view(torch.uint8)
        self.block = max(16, triton.next_power_of_2(self.channels))
        exact = query.dtype == torch.float32
        self.constants = {"D": self.channels, "MASK": self.kind, "CAUSAL": is_causal, "EXACT": exact, "BD": self.block}

    @staticmethod
    def fold(x: Tensor) -> Tensor:
        """(T, B, H, N, d) or (B, H, N, d) -> (T * B or B, H, N, d)."""
        return _aligned(x.flatten(0, -4))

    @property
    def strides(self) -> list[tuple[int, ...]]:
        return [x.stride()[:3] for x in (*self.shared, *self.task)] + [self.mask_strides]


def _aligned(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def expanded_attention(query: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    """(..., H, N, d) laid out (..., N, H, d), and (2, ..., H, N): greatest scores and sums."""
    p = _Problem(query, *others)
    out = torch.empty(*p.lead, p.queries, p.heads, p.channels, dtype=query.dtype, device=query.device)
    statistics = torch.empty(2, *p.lead, p.heads, p.queries, dtype=torch.float32, device=query.device)
    own = tile("forward", p.block, query)
    if out.numel():
        with on_device(query):
            _attend[(p.rows * p.heads * triton.cdiv(p.queries, own.queries),)](
                *(*p.shared, *p.task, p.mask, out, statistics, p.all_rows, p.scale, p.sizes, *p.strides),
                **p.constants,
                **own.options(p.task_keys),
            )
    return out.transpose(-3, -2), statistics


def expanded_attention_backward(
    grad: Tensor,
    output: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    task_key: Tensor,
    task_value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    mask_grad: bool,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, task key and task value, contiguous, and of an additive mask."""
    p = _Problem(query, key, value, task_key, task_value, attn_mask, is_causal, scale)
    wide = {"dtype": torch.float32, "device": query.device}
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    delta = torch.empty(p.rows, p.heads, p.queries, **wide)
    grad = p.fold(grad)
    output = output.transpose(-3, -2).contiguous()  # a view, as the forward lays it out
    first, second = (tile(kernel, p.block, query) for kernel in ("query gradients", "key gradients"))
    blocks = triton.cdiv(p.queries, first.queries)
    parts = [torch.empty(p.rows, p.heads, blocks, p.task_keys, p.channels, **wide) for _ in range(2)]
    with on_device(query):
        if grads[0].numel():
            _query_gradients[(p.rows * p.heads * blocks,)](
                *(
                    grad,
                    *p.shared,
                    *p.task,
                    p.mask,
                    output,
                    statistics,
                    grads[0],
                    *parts,
                    delta,
                    p.all_rows,
                    p.scale,
                    p.sizes,
                ),
                *(grad.stride()[:3], *p.strides),
                **p.constants,
                **first.options(p.task_keys),
            )
        if grads[1].numel():
            strides = p.strides
            _key_gradients[(p.rows * p.key_heads * triton.cdiv(p.keys, second.keys),)](
                *(grad, *p.shared, p.mask, statistics, delta, *grads[1:], p.all_rows, p.scale, p.sizes),
                *(grad.stride()[:3], *strides[:3], strides[-1]),
                **p.constants,
                **second.options(),
            )
    groups = (
        p.rows // max(1, p.images),
        p.images,
        p.key_heads,
        p.heads // p.key_heads * blocks,
        p.task_keys,
        p.channels,
    )
    d_mask = query.new_empty(0)
    if mask_grad and attn_mask is not None:
        d_mask = _mask_gradient(p, grad, statistics, delta, attn_mask)
    task = [x.view(groups).sum((1, 3)).view(task_key.shape).to(query.dtype) for x in parts]
    if p.sign < 0:
        grads[0].neg_()
    return *grads, *task, d_mask


def _mask_gradient(p: _Problem, grad: Tensor, statistics: Tensor, delta: Tensor, attn_mask: Tensor) -> Tensor:
    """In the shape of the mask. Its broadcast axes of streams, images and heads are summed on chip."""
    leading = (1, *p.lead) if len(p.lead) == 1 else p.lead
    shape = (*(1,) * (5 - attn_mask.dim()), *attn_mask.shape)
    kept = tuple(min(size, full) for size, full in zip(shape, (*leading, p.heads), strict=False))
    own = tile("mask gradients", p.block, grad)
    d_mask = torch.zeros(*kept, p.queries, p.keys, dtype=torch.float32, device=grad.device)
    if d_mask.numel() and p.rows:
        strides = p.strides
        with on_device(grad):
            grid = triton.cdiv(p.queries, own.queries) * triton.cdiv(p.keys, own.keys), kept[0] * kept[1] * kept[2]
            _mask_gradients[grid](
                *(
                    grad,
                    *p.shared,
                    p.mask,
                    statistics,
                    delta,
                    d_mask,
                    p.all_rows,
                    p.scale,
                    (*p.sizes, leading[0]),
                    kept,
                ),
                *(grad.stride()[:3], *strides[:3], strides[-1]),
                **p.constants,
                **own.options(),
            )
    return d_mask.sum_to_size(shape).view(attn_mask.shape).to(attn_mask.dtype)
