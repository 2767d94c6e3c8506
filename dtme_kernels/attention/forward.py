"""Triton: attention over shared and task keys in one online softmax."""

import triton
import triton.language as tl

from .blocks import SIZES, hide, load, load_keys, matrix_of, place_of, span, statistics_of, store, store_statistics


@triton.jit
def _attend_part(
    b_q,
    b_out,
    b_sum,
    b_most,
    keys_of,
    values_of,
    begin,
    end,
    m,
    queries,
    keys,
    scale,
    mask,
    mask_strides,
    PART: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Take the keys from begin to end into the online softmax. ``keys_of``, ``values_of``: shared and task matrices."""
    unit = 1.0 if MASK == "additive" else scale
    for first in range(begin, end, BN):
        n = first + tl.arange(0, BN)  # [BN]
        b_k = load_keys(keys_of[0], keys_of[1], n, keys, end, D, BD, PART, JOINED)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if PART > 0:
            b_s = hide(b_s, scale, mask, mask_strides, m[:, None], n[None, :], queries, end, MASK, CAUSAL)
        b_new = tl.maximum(b_most, tl.max(b_s, 1) * unit)
        # while nothing is visible, -inf is the most: its place is taken by a number that makes exp2 give 0
        b_at = tl.where(b_new == float("-inf"), 0.0, b_new) if MASK != "" else b_new
        b_p = tl.exp2(b_s * unit - b_at[:, None])
        b_shrink = tl.exp2(b_most - b_at)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = load_keys(values_of[0], values_of[1], n, keys, end, D, BD, PART, JOINED)  # [BN, BD]
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
    scale,
    images,
    heads,
    groups,
    queries,
    keys,
    task_keys,
    strides,
    mask_strides,
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """output[row, queries, head] for BM queries."""
    q_strides, k_strides, v_strides, task_k_strides, task_v_strides = strides
    block, head, row = place_of(tl.cdiv(queries, BM), heads, CAUSAL)
    stream, image, key_head = row // images, row % images, head // groups
    m = block * BM + tl.arange(0, BM)  # [BM]
    b_q = load(matrix_of(query, q_strides, row, head), m, queries, D, BD, True)
    keys_of = matrix_of(key, k_strides, row, key_head), matrix_of(task_key, task_k_strides, stream, key_head)
    values_of = matrix_of(value, v_strides, row, key_head), matrix_of(task_value, task_v_strides, stream, key_head)
    mask += stream * mask_strides[0] + image * mask_strides[1] + head.to(tl.int64) * mask_strides[2]
    b_out = tl.zeros([BM, BD], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_most = tl.full([BM], float("-inf"), tl.float32)
    for part in tl.static_range(1 if MASK != "" else 0, 3):
        if part != 1 or not JOINED:
            begin, end = span(part, block * BM, keys, task_keys, MASK != "", CAUSAL, JOINED, BM, BN)
            b_out, b_sum, b_most = _attend_part(
                b_q, b_out, b_sum, b_most, keys_of, values_of, begin, end, m, queries, keys, scale, mask, mask_strides,
                part, D, MASK if part == 1 else "", CAUSAL and part == 1, JOINED, PRECISION,
                BT if part == 2 else BN, BD,
            )  # fmt: skip
    b_out *= (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    stride = tl.cast(heads, tl.int64) * D
    store((output + row * queries * stride + head * D, stride), m, queries, b_out, D, BD)
    statistics = statistics_of(statistics, row * heads + head, queries, EXACT)
    store_statistics(statistics, m, queries, b_most, b_sum, EXACT)
