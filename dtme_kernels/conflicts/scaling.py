"""Triton: gradients and eigenvectors as float16 numbers. A power of two each, and the rest of the rounding.

A float16 number has 11 bits, and two of them 22, in a range of 2^30 (and 2^10 more with fewer bits). The power of two
moves the largest entry of a gradient, or of an eigenvector, well up in that range; it is exact, and the sign of a dot
product does not know it. Copies are padded with zeros to whole tiles, so that the rotation masks nothing and loads
16 bytes at a time, whatever the strides of the originals were.
"""

import triton
import triton.language as tl


@triton.jit
def _power_of_two(peak):
    """Of the bits of |x| in float32: 2^e with 2^8 <= 2^e |x| < 2^9, or as near as float32 goes; NaN for NaN and Inf."""
    exponent = tl.minimum(262 - (peak >> 23), 254)
    return tl.where(peak < 0x7F800000, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def _magnitude(x):
    """The bits of |x| in float32, which are ordered as |x| is, with Inf and NaN above all numbers."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scales(start, stride, inside, p, BT: tl.constexpr, BK: tl.constexpr):
    """The power of two for each of the gradients that begin at ``start`` [BT], 0 for one of zeros."""
    peak = tl.zeros([BT], tl.int32)
    for first in range(0, p, BK):
        channel = first + tl.arange(0, BK)[None, :]
        b_g = tl.load(start[:, None] + channel * stride, inside[:, None] & (channel < p), 0.0)  # [BT, BK]
        peak = tl.maximum(peak, tl.max(_magnitude(b_g), 1))
    return tl.where(peak == 0, 0.0, _power_of_two(peak))


@triton.jit
def _store_terms(pointer, terms_apart, b_x, mask, TERMS: tl.constexpr):
    """b_x in float16 and, with two terms, what that leaves of it."""
    b_high = b_x.to(tl.float16)
    tl.store(pointer, b_high, mask)
    if TERMS == 2:
        tl.store(pointer + terms_apart, (b_x - b_high.to(tl.float32)).to(tl.float16), mask)


@triton.jit
def _add_products(b_sums, b_x, COUNT: tl.constexpr):
    """Of the first COUNT tiles with themselves and with all that follow."""
    b_next = ()
    for i in tl.static_range(COUNT):
        for j in tl.static_range(i, len(b_x)):
            b_next += (b_sums[len(b_next)] + tl.sum(b_x[i] * b_x[j], 1),)
    return b_next


@triton.jit
def _store_products(norms, totals, b_sums, row, rows, FIRST: tl.constexpr, END: tl.constexpr, K: tl.constexpr):
    for i in tl.static_range(FIRST, END):
        for j in tl.static_range(i, K):
            # the pairs that begin with FIRST, FIRST + 1, ..., each task's with itself included
            b_sum = b_sums[(i - FIRST) * (2 * K - FIRST - i + 1) // 2 + j - i]
            if i == j:
                tl.store(norms + i * rows + row, tl.sqrt(b_sum), row < rows)
            else:
                tl.store(totals + (i * (2 * K - i - 1) // 2 + j - i - 1) * rows + row, b_sum, row < rows)


@triton.jit(do_not_specialize=["inner", "start", "stop", "rows"])
def prepare_gradients(
    grads,
    terms,
    scales,
    norms,
    totals,
    inner,
    start,
    stop,
    rows,
    p,
    width,
    strides,
    K: tl.constexpr,
    G: tl.constexpr,
    TERMS: tl.constexpr,
    TOTALS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Scale the tokens from ``start`` to ``stop`` of gradients (K, outer, inner, p); those up to ``rows`` are zeros.

    terms (TERMS, K, rows, width) float16; scales (K, rows): the power of two, 0 for a gradient of zeros, NaN for one
    with NaN or Inf. With TOTALS, of the scaled gradients: norms (K, rows) and totals (P, rows), <g_i, g_j>, of G tasks
    in one loop over the channels: the sums of as many are in registers.
    """
    row = tl.program_id(0) * BT + tl.arange(0, BT)  # [BT], of the copies
    token = start + row
    inside = token < stop
    # of a token within its task; may pass 2^31
    offset = (token // inner).to(tl.int64) * strides[1] + (token % inner).to(tl.int64) * strides[2]
    b_scales = ()
    for task in tl.static_range(K):
        start = grads + tl.cast(strides[0], tl.int64) * task + offset  # [BT]
        b_scale = _scales(start, strides[3], inside, p, BT, BK)
        tl.store(scales + task * rows + row, b_scale, row < rows)
        b_scales += (b_scale,)
    terms_apart = tl.cast(rows, tl.int64) * width * K
    for begin in tl.static_range(0, K, G):
        b_sums = ()  # [BT]: of G tasks the products with themselves and with all later ones
        for i in tl.static_range(begin, min(begin + G, K)):
            for _ in tl.static_range(i, K):
                b_sums += (tl.zeros([BT], tl.float32),)
        for first in range(0, width, BK):
            channel = first + tl.arange(0, BK)[None, :]
            mask = inside[:, None] & (channel < p)
            b_x = ()
            for task in tl.static_range(begin, K):
                pointer = grads + tl.cast(strides[0], tl.int64) * task + offset[:, None]
                b_g = tl.load(pointer + channel * strides[3], mask, 0.0).to(tl.float32) * b_scales[task][:, None]
                if begin == 0:
                    target = terms + (tl.cast(rows, tl.int64) * task + row)[:, None] * width + channel
                    _store_terms(target, terms_apart, b_g, (row < rows)[:, None] & (channel < width), TERMS)
                b_x += (b_g,)
            if TOTALS:
                b_sums = _add_products(b_sums, b_x, min(G, K - begin))
        if TOTALS:
            _store_products(norms, totals, b_sums, row, rows, begin, min(begin + G, K), K)


@triton.jit
def split_basis(
    basis, terms, units, p, height, width, strides, TERMS: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr
):
    """terms (TERMS, height, width) float16: the basis scaled column by column; units[column] undoes the scale."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)  # [BN]
    peak = tl.zeros([BN], tl.int32)
    for first in range(0, p, BC):
        row = first + tl.arange(0, BC)  # [BC]
        mask = (row < p)[:, None] & (column < p)[None, :]
        b_u = tl.load(basis + row[:, None] * strides[0] + column[None, :] * strides[1], mask, 0.0)  # [BC, BN]
        peak = tl.maximum(peak, tl.max(_magnitude(b_u), 0))
    scale = tl.where(peak == 0, 1.0, _power_of_two(peak))
    tl.store(units + column, tl.div_rn(tl.full([BN], 1.0, tl.float32), scale), column < width)  # exact, as / is not
    for first in range(0, height, BC):
        row = first + tl.arange(0, BC)
        mask = (row < p)[:, None] & (column < p)[None, :]
        b_u = tl.load(basis + row[:, None] * strides[0] + column[None, :] * strides[1], mask, 0.0)
        pointer = terms + row[:, None] * width + column[None, :]
        inside = (row < height)[:, None] & (column < width)[None, :]
        _store_terms(pointer, height * width, b_u.to(tl.float32) * scale[None, :], inside, TERMS)
