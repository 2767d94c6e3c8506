"""Triton: gradients of attention over shared and task keys, every sum with one owner."""

import triton
import triton.language as tl

from .blocks import (
    LOG2E,
    SIZES,
    hide,
    load,
    load_keys,
    load_statistics,
    mask_of,
    matrix_of,
    probabilities,
    program_of,
    query_program,
    span,
    statistics_of,
    store,
)


@triton.jit
def _query_part(
    b_dq,
    queries_of,
    keys_of,
    values_of,
    d_task,
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
    EXACT: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """dQ, but for the scale, += dS K over the keys from begin to end; of task keys also dK = dS^T Q and dV = P^T dO."""
    b_q, b_do, b_delta, shift, inverse_sum = queries_of
    unit = 1.0 if MASK == "additive" else scale
    for first in range(begin, end, BN):
        n = first + tl.arange(0, BN)  # [BN]
        b_k = load_keys(keys_of, n, keys, end, D, BD, PART, JOINED)  # [BN, BD]
        b_v = load_keys(values_of, n, keys, end, D, BD, PART, JOINED)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if PART > 0:
            b_s = hide(b_s, scale, mask, m[:, None], n[None, :], queries, end, MASK, CAUSAL)
        b_p = probabilities(b_s * unit, shift[:, None], inverse_sum[:, None], EXACT)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
        if PART == 2:
            d_key, d_value = d_task
            b_dv = tl.dot(tl.trans(b_p.to(b_v.dtype)), b_do, input_precision=PRECISION)  # [BN, BD]
            store((d_value, D), n - keys, end - keys, b_dv, D, BD)
            b_dk = tl.dot(tl.trans(b_ds), b_q, input_precision=PRECISION)
            store((d_key, D), n - keys, end - keys, b_dk * (scale / LOG2E), D, BD)
    return b_dq


@triton.jit(do_not_specialize=SIZES)
def query_gradients(
    grad,
    shared,
    task,
    mask,
    output,
    statistics,
    d_query,
    d_task,
    delta,
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
    """dQ and delta = rowsum(dO O) of BM queries; what they have of dK and dV of the task keys, a partial sum."""
    block, head, row, m, query, keys_of, values_of, mask = query_program(
        shared, task, mask, images, heads, groups, queries, CAUSAL, BM
    )
    b_q = load(query, m, queries, D, BD, True)  # [BM, BD]
    b_do = load(matrix_of(grad, row, head), m, queries, D, BD, True)
    b_o = load(matrix_of(output, row, head), m, queries, D, BD, True)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)  # [BM]
    vector = row * heads + head
    tl.store(delta + vector * queries + m, b_delta, m < queries)
    shift, inverse_sum = load_statistics(statistics_of(statistics, vector, queries, EXACT), m, queries, EXACT)
    queries_of = b_q, b_do, b_delta, shift, inverse_sum
    partial = (vector * tl.cdiv(queries, BM) + block) * task_keys * D
    d_task = d_task[0] + partial, d_task[1] + partial
    b_dq = tl.zeros([BM, BD], tl.float32)
    for part in tl.static_range(1 if MASK != "" else 0, 3):
        if part != 1 or not JOINED:
            begin, end = span(part, block * BM, keys, task_keys, MASK != "", CAUSAL, JOINED, BM, BN)
            b_dq = _query_part(
                b_dq, queries_of, keys_of, values_of, d_task, mask, m, begin, end, queries, keys, scale,
                part, D, MASK if part == 1 else "", CAUSAL and part == 1, EXACT, JOINED, PRECISION,
                BT if part == 2 else BN, BD,
            )  # fmt: skip
    UNIT: tl.constexpr = 8 if D % 8 == 0 else 1
    store(matrix_of(d_query, row, head, UNIT), m, queries, b_dq * (scale / LOG2E), D, BD)


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
    grad,
    shared,
    mask,
    statistics,
    delta,
    d_key,
    d_value,
    scale,
    images,
    heads,
    groups,
    queries,
    keys,
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """dK and dV, of the same strides, of BN shared keys, summed over the query heads that share them."""
    query, key, value = shared
    block, key_head, row = program_of(tl.cdiv(keys, BN), heads // groups, False)
    n = block * BN + tl.arange(0, BN)  # [BN]
    b_k = load(matrix_of(key, row, key_head), n, keys, D, BD, True)
    b_v = load(matrix_of(value, row, key_head), n, keys, D, BD, True)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    unit = 1.0 if MASK == "additive" else scale
    begin = block * BN // BM * BM if CAUSAL else 0
    for head in range(key_head * groups, (key_head + 1) * groups):
        q, do = matrix_of(query, row, head), matrix_of(grad, row, head)
        head_mask = mask_of(mask, row // images, row % images, head)
        vector = row * heads + head
        head_statistics = statistics_of(statistics, vector, queries, EXACT)
        for first in range(begin, queries, BM):
            m = first + tl.arange(0, BM)  # [BM]
            b_q = load(q, m, queries, D, BD, True)  # [BM, BD]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
            if MASK != "" or CAUSAL:
                b_s = hide(b_s, scale, head_mask, m[None, :], n[:, None], queries, keys, MASK, CAUSAL)
            shift, inverse_sum = load_statistics(head_statistics, m, queries, EXACT)
            b_p = probabilities(b_s * unit, shift[None, :], inverse_sum[None, :], EXACT)
            b_do = load(do, m, queries, D, BD, True)  # [BM, BD]
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_delta = tl.load(delta + vector * queries + m, m < queries, 0.0)
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
            b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
    UNIT: tl.constexpr = 8 if D % 8 == 0 else 1
    store(matrix_of(d_key, row, key_head, UNIT), n, keys, b_dk * (scale / LOG2E), D, BD)
    store(matrix_of((d_value, d_key[1]), row, key_head, UNIT), n, keys, b_dv, D, BD)


@triton.jit(do_not_specialize=[*SIZES, "streams", "kept_streams", "kept_images", "kept_heads"])
def mask_gradients(
    grad,
    shared,
    mask,
    statistics,
    delta,
    d_mask,
    scale,
    streams,
    images,
    heads,
    groups,
    queries,
    keys,
    kept_streams,
    kept_images,
    kept_heads,
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One tile of dS, summed over the streams, images and heads that share the mask; it has ``kept`` of each, or 1."""
    query, key, value = shared
    blocks = tl.cdiv(queries, BM)
    tiles = blocks * tl.cdiv(keys, BN)
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    m = tile % blocks * BM + tl.arange(0, BM)  # [BM]
    n = tile // blocks * BN + tl.arange(0, BN)  # [BN]
    share_images, share_heads = images // kept_images, heads // kept_heads
    b_sum = tl.zeros([BM, BN], tl.float32)
    for i in range(streams // kept_streams * share_images * share_heads):
        image = part // kept_heads % kept_images + i // share_heads % share_images
        head = part % kept_heads + i % share_heads
        stream = (part // (kept_images * kept_heads) + i // (share_images * share_heads)).to(tl.int64)
        row, key_head = stream * images + image, head // groups
        b_q = load(matrix_of(query, row, head), m, queries, D, BD, True)
        b_k = load(matrix_of(key, row, key_head), n, keys, D, BD, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        head_mask = mask_of(mask, stream, image, head)
        b_s = hide(b_s, scale, head_mask, m[:, None], n[None, :], queries, keys, MASK, False)
        vector = row * heads + head
        shift, inverse_sum = load_statistics(statistics_of(statistics, vector, queries, EXACT), m, queries, EXACT)
        b_p = probabilities(b_s, shift[:, None], inverse_sum[:, None], EXACT)
        b_do = load(matrix_of(grad, row, head), m, queries, D, BD, True)
        b_v = load(matrix_of(value, row, key_head), n, keys, D, BD, True)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_sum += b_p * (b_dp - tl.load(delta + vector * queries + m, m < queries, 0.0)[:, None])
    pointer = d_mask + (part.to(tl.int64) * queries + m)[:, None] * keys + n[None, :]
    tl.store(pointer, b_sum, (m < queries)[:, None] & (n < keys)[None, :])
