"""Triton: attention over shared and task keys in one online softmax."""

import triton
import triton.language as tl

from .blocks import SIZES, hide, load, place_of, span, store


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
        b_k = load(k, n, k_stride, end, D, BD, PART > 0)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if PART > 0:
            b_s = hide(b_s, scale, mask, mask_strides, m[:, None], n[None, :], queries, end, MASK, CAUSAL)
        b_new = tl.maximum(b_most, tl.max(b_s, 1) * unit)
        # while nothing is visible, -inf is the most: its place is taken by a number that makes exp2 give 0
        b_at = tl.where(b_new == float("-inf"), 0.0, b_new) if MASK != "" else b_new
        b_p = tl.exp2(b_s * unit - b_at[:, None])
        b_shrink = tl.exp2(b_most - b_at)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = load(v, n, v_stride, end, D, BD, PART > 0)  # [BN, BD]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision=PRECISION)
        b_most = b_new
    return b_out, b_sum, b_most


@triton.jit(do_not_specialize=SIZES)
def attend(
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
    images,
    heads,
    groups,
    queries,
    keys,
    task_keys,
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
    """output[row, queries, head] for BM queries."""
    block, head, row = place_of(tl.cdiv(queries, BM), heads, CAUSAL)
    stream, image, key_head = row // images, row % images, (head // groups).to(tl.int64)
    m = block * BM + tl.arange(0, BM)  # [BM]
    b_q = load(query + row * q_strides[0] + head.to(tl.int64) * q_strides[1], m, q_strides[2], queries, D, BD, True)
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
        begin, end = span(part, block * BM, keys, task_keys, MASK != "", CAUSAL, BM, BN)
        b_out, b_sum, b_most = _attend_part(
            b_q, b_out, b_sum, b_most, k, k_stride, v, v_stride, begin, end, m, queries, scale, mask, mask_strides,
            part, D, MASK if part == 1 else "", CAUSAL and part == 1, PRECISION, BT if part == 2 else BN, BD,
        )  # fmt: skip
    b_out *= (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    stride = tl.cast(heads, tl.int64) * D
    store(output + row * queries * stride + head * D, m, stride, queries, b_out, D, BD)
    vector = (row * heads + head) * queries + m
    tl.store(statistics + vector, tl.where(b_sum == 0.0, float("inf"), b_most), m < queries)
    tl.store(statistics + all_rows + vector, tl.where(b_sum == 0.0, 1.0, b_sum), m < queries)
