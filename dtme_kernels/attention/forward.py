"""Triton: attention over shared and task keys in one online softmax."""

import triton
import triton.language as tl

from .blocks import SIZES, hide, load, load_keys, query_program, span, statistics_of, store, store_statistics


@triton.jit
def _attend_part(
    state,
    b_q,
    keys_of,
    values_of,
    mask,
    m,
    begin,
    end,
    queries,
    keys,
    scale,
    PART: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Take the keys from begin to end into the online softmax: its state is the output, row_sum and row_max so far."""
    b_out, row_sum, row_max = state
    unit = 1.0 if MASK == "additive" else scale
    for first in range(begin, end, BN):
        n = first + tl.arange(0, BN)  # [BN]
        b_k = load_keys(keys_of, n, keys, end, D, BD, PART, JOINED)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if PART > 0:
            b_s = hide(b_s, scale, mask, m[:, None], n[None, :], queries, end, MASK, CAUSAL)
        new_max = tl.maximum(row_max, tl.max(b_s, 1) * unit)
        # while nothing is visible, the row_max is -inf: a number in its place makes exp2 give 0
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASK != "" else new_max
        b_p = tl.exp2(b_s * unit - shift[:, None])
        shrink = tl.exp2(row_max - shift)
        row_sum = row_sum * shrink + tl.sum(b_p, 1)
        b_v = load_keys(values_of, n, keys, end, D, BD, PART, JOINED)  # [BN, BD]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * shrink[:, None], input_precision=PRECISION)
        row_max = new_max
    return b_out, row_sum, row_max


@triton.jit(do_not_specialize=SIZES)
def attend(
    shared,
    task,
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
    block, head, row, m, query, keys_of, values_of, mask = query_program(
        shared, task, mask, images, heads, groups, queries, CAUSAL, BM
    )
    b_q = load(query, m, queries, D, BD, True)  # [BM, BD]
    state = tl.zeros([BM, BD], tl.float32), tl.zeros([BM], tl.float32), tl.full([BM], float("-inf"), tl.float32)
    for part in tl.static_range(1 if MASK != "" else 0, 3):
        if part != 1 or not JOINED:
            begin, end = span(part, block * BM, keys, task_keys, MASK != "", CAUSAL, JOINED, BM, BN)
            state = _attend_part(
                state, b_q, keys_of, values_of, mask, m, begin, end, queries, keys, scale,
                part, D, MASK if part == 1 else "", CAUSAL and part == 1, JOINED, PRECISION,
                BT if part == 2 else BN, BD,
            )  # fmt: skip
    b_out, row_sum, row_max = state
    b_out *= (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    stride = tl.cast(heads, tl.int64) * D
    store((output + row * queries * stride + head * D, stride), m, queries, b_out, D, BD)
    statistics = statistics_of(statistics, row * heads + head, queries, EXACT)
    store_statistics(statistics, m, queries, row_max, row_sum, EXACT)
