"""Triton: gradients of attention over shared and task keys, every sum with one owner."""

import triton
import triton.language as tl

from .blocks import LOG2E, SIZES, hide, load, load_statistics, place_of, span, store


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
        b_k = load(k, n, k_stride, end, D, BD, PART > 0)  # [BN, BD]
        b_v = load(v, n, v_stride, end, D, BD, PART > 0)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if PART > 0:
            b_s = hide(b_s, scale, mask, mask_strides, m[:, None], n[None, :], queries, end, MASK, CAUSAL)
        b_p = tl.exp2(b_s * unit - b_at[:, None])
        if EXACT:
            b_p *= b_share[:, None]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
        if PART == 2:
            b_dv = tl.dot(tl.trans(b_p.to(b_v.dtype)), b_do, input_precision=PRECISION)  # [BN, BD]
            store(d_v, n, D, end, b_dv, D, BD)
            b_dk = tl.dot(tl.trans(b_ds), b_q, input_precision=PRECISION)
            store(d_k, n, D, end, b_dk * (scale / LOG2E), D, BD)
    return b_dq


@triton.jit(do_not_specialize=SIZES)
def query_gradients(
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
    images,
    heads,
    groups,
    queries,
    keys,
    task_keys,
    d_strides,
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
    blocks = tl.cdiv(queries, BM)
    block, head, row = place_of(blocks, heads, CAUSAL)
    stream, image, key_head = row // images, row % images, (head // groups).to(tl.int64)
    m = block * BM + tl.arange(0, BM)  # [BM]
    b_q = load(query + row * q_strides[0] + head.to(tl.int64) * q_strides[1], m, q_strides[2], queries, D, BD, True)
    grad += row * grad_strides[0] + head.to(tl.int64) * grad_strides[1]
    b_do = load(grad, m, grad_strides[2], queries, D, BD, True)
    mask += stream * mask_strides[0] + image * mask_strides[1] + head.to(tl.int64) * mask_strides[2]
    stride = tl.cast(heads, tl.int64) * D
    b_o = load(output + row * queries * stride + head * D, m, stride, queries, D, BD, True)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)  # [BM]
    vector = (row * heads + head) * queries + m
    tl.store(delta + vector, b_delta, m < queries)
    b_at, b_share = load_statistics(statistics, vector, all_rows, m < queries, EXACT)
    b_dq = tl.zeros([BM, BD], tl.float32)
    partial = ((row * heads + head) * blocks + block) * task_keys * D
    for part in tl.static_range(1 if MASK != "" else 0, 3):
        k, k_stride = key + row * k_strides[0] + key_head * k_strides[1], k_strides[2]
        v, v_stride = value + row * v_strides[0] + key_head * v_strides[1], v_strides[2]
        if part == 2:
            k, k_stride = task_key + stream * task_k_strides[0] + key_head * task_k_strides[1], task_k_strides[2]
            v, v_stride = task_value + stream * task_v_strides[0] + key_head * task_v_strides[1], task_v_strides[2]
        begin, end = span(part, block * BM, keys, task_keys, MASK != "", CAUSAL, BM, BN)
        b_dq = _query_part(
            b_q, b_do, b_delta, b_at, b_share, b_dq, k, k_stride, v, v_stride, begin, end, m, queries, scale,
            mask, mask_strides, d_task_key + partial, d_task_value + partial,
            part, D, MASK if part == 1 else "", CAUSAL and part == 1, EXACT, PRECISION, BT if part == 2 else BN, BD,
        )  # fmt: skip
    start = d_query + row * d_strides[0] + head.to(tl.int64) * d_strides[1]
    store(start, m, d_strides[2], queries, b_dq * (scale / LOG2E), D, BD)


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
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
    images,
    heads,
    groups,
    queries,
    keys,
    task_keys,
    d_strides,
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
    """dK and dV of BN shared keys, summed over the query heads that share them."""
    key_heads = heads // groups
    blocks = tl.cdiv(keys, BN)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    key_head, row = rest % key_heads, (rest // key_heads).to(tl.int64)
    stream, image = row // images, row % images
    n = block * BN + tl.arange(0, BN)  # [BN]
    b_k = load(key + row * k_strides[0] + key_head.to(tl.int64) * k_strides[1], n, k_strides[2], keys, D, BD, True)
    b_v = load(value + row * v_strides[0] + key_head.to(tl.int64) * v_strides[1], n, v_strides[2], keys, D, BD, True)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    unit = 1.0 if MASK == "additive" else scale
    begin = block * BN // BM * BM if CAUSAL else 0
    for head in range(key_head * groups, (key_head + 1) * groups):
        own = tl.cast(head, tl.int64)
        q, do = query + row * q_strides[0] + own * q_strides[1], grad + row * grad_strides[0] + own * grad_strides[1]
        own_mask = mask + stream * mask_strides[0] + image * mask_strides[1] + own * mask_strides[2]
        vector = (row * heads + head) * queries
        for first in range(begin, queries, BM):
            m = first + tl.arange(0, BM)  # [BM]
            b_q = load(q, m, q_strides[2], queries, D, BD, True)  # [BM, BD]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
            if MASK != "" or CAUSAL:
                b_s = hide(b_s, scale, own_mask, mask_strides, m[None, :], n[:, None], queries, keys, MASK, CAUSAL)
            b_at, b_share = load_statistics(statistics, vector + m, all_rows, m < queries, EXACT)
            b_p = tl.exp2(b_s * unit - b_at[None, :])
            if EXACT:
                b_p *= b_share[None, :]
            b_do = load(do, m, grad_strides[2], queries, D, BD, True)  # [BM, BD]
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_delta = tl.load(delta + vector + m, m < queries, 0.0)
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
            b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
    start = row * d_strides[0] + key_head.to(tl.int64) * d_strides[1]
    store(d_key + start, n, d_strides[2], keys, b_dk * (scale / LOG2E), D, BD)
    store(d_value + start, n, d_strides[2], keys, b_dv, D, BD)


@triton.jit(do_not_specialize=[*SIZES, "streams", "kept_streams", "kept_images", "kept_heads"])
def mask_gradients(
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
    images,
    heads,
    groups,
    queries,
    keys,
    task_keys,
    streams,
    kept_streams,
    kept_images,
    kept_heads,
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
    """One tile of dS, summed over the streams, images and heads that share the mask; ``kept_...`` are its own, or 1."""
    blocks = tl.cdiv(queries, BM)
    tiles = blocks * tl.cdiv(keys, BN)
    tile, own = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    m = tile % blocks * BM + tl.arange(0, BM)  # [BM]
    n = tile // blocks * BN + tl.arange(0, BN)  # [BN]
    own_stream, own_image, own_head = (
        own // (kept_images * kept_heads),
        own // kept_heads % kept_images,
        own % kept_heads,
    )
    share_images, share_heads = images // kept_images, heads // kept_heads
    b_sum = tl.zeros([BM, BN], tl.float32)
    for i in range(streams // kept_streams * share_images * share_heads):
        image, head = own_image + i // share_heads % share_images, own_head + i % share_heads
        stream = (own_stream + i // (share_images * share_heads)).to(tl.int64)
        row, key_head = stream * images + image, (head // groups).to(tl.int64)
        head = head.to(tl.int64)
        b_q = load(query + row * q_strides[0] + head * q_strides[1], m, q_strides[2], queries, D, BD, True)
        b_k = load(key + row * k_strides[0] + key_head * k_strides[1], n, k_strides[2], keys, D, BD, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        own_mask = mask + stream * mask_strides[0] + image.to(tl.int64) * mask_strides[1] + head * mask_strides[2]
        b_s = hide(b_s, scale, own_mask, mask_strides, m[:, None], n[None, :], queries, keys, MASK, False)
        vector = (row * heads + head) * queries + m
        b_at, b_share = load_statistics(statistics, vector, all_rows, m < queries, EXACT)
        b_p = tl.exp2(b_s - b_at[:, None])
        if EXACT:
            b_p *= b_share[:, None]
        b_do = load(grad + row * grad_strides[0] + head * grad_strides[1], m, grad_strides[2], queries, D, BD, True)
        b_v = load(value + row * v_strides[0] + key_head * v_strides[1], n, v_strides[2], keys, D, BD, True)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_sum += b_p * (b_dp - tl.load(delta + vector, m < queries, 0.0)[:, None])
    place = d_mask + (own.to(tl.int64) * queries + m)[:, None] * keys + n[None, :]
    tl.store(place, b_sum, (m < queries)[:, None] & (n < keys)[None, :])
