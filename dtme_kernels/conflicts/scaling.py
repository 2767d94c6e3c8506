"""Triton: float32 numbers as float16 ones. A power of two a token and an eigenvector, and the rest of the rounding.

A float16 number has 11 bits, and two of them 22, in a range of 2^30 (and 2^10 more with fewer bits). The power of two
moves the largest entry of a gradient, or of an eigenvector, well up in that range; it is exact, and the sign of a dot
product does not know it.
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
def token_offset(token, sizes, strides):
    """Where a token lies within its task, for gradients (K, outer, inner, p)."""
    _, inner = sizes
    return (token // inner).to(tl.int64) * strides[1] + (token % inner).to(tl.int64) * strides[2]  # may pass 2^31


@triton.jit(do_not_specialize=["num_tokens", "inner"])
def scale_tokens(grads, scales, num_tokens, inner, p, strides, BT: tl.constexpr, BC: tl.constexpr):
    """scales[task, token]: the power of two for a gradient, 0 for a gradient of zeros, NaN for one with NaN or Inf."""
    sizes = num_tokens, inner
    token = tl.program_id(0) * BT + tl.arange(0, BT)  # [BT]
    task = tl.program_id(1).to(tl.int64)
    inside = token < num_tokens
    start = grads + task * strides[0] + token_offset(token, sizes, strides)  # [BT]
    peak = tl.zeros([BT], tl.int32)
    for first in range(0, p, BC):
        channel = first + tl.arange(0, BC)  # [BC]
        mask = inside[:, None] & (channel < p)[None, :]
        b_g = tl.load(start[:, None] + channel[None, :] * strides[3], mask, 0.0)  # [BT, BC]
        peak = tl.maximum(peak, tl.max(_magnitude(b_g), 1))
    tl.store(scales + task * num_tokens + token, tl.where(peak == 0, 0.0, _power_of_two(peak)), inside)


@triton.jit
def split_basis(basis, terms, units, p, strides, BC: tl.constexpr, BN: tl.constexpr):
    """terms[0] + terms[1] = basis scaled column by column, both float16; units[column] undoes the scale."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)  # [BN]
    peak = tl.zeros([BN], tl.int32)
    for first in range(0, p, BC):
        row = first + tl.arange(0, BC)  # [BC]
        mask = (row < p)[:, None] & (column < p)[None, :]
        b_u = tl.load(basis + row[:, None] * strides[0] + column[None, :] * strides[1], mask, 0.0)  # [BC, BN]
        peak = tl.maximum(peak, tl.max(_magnitude(b_u), 0))
    scale = _power_of_two(peak)
    tl.store(units + column, tl.div_rn(tl.full([BN], 1.0, tl.float32), scale), column < p)  # exact, as / is not
    for first in range(0, p, BC):
        row = first + tl.arange(0, BC)
        mask = (row < p)[:, None] & (column < p)[None, :]
        b_u = tl.load(basis + row[:, None] * strides[0] + column[None, :] * strides[1], mask, 0.0)
        b_u = b_u.to(tl.float32) * scale[None, :]
        b_high = b_u.to(tl.float16)
        place = terms + row[:, None] * p + column[None, :]
        tl.store(place, b_high, mask)
        tl.store(place + p * p, (b_u - b_high.to(tl.float32)).to(tl.float16), mask)


@triton.jit
def load_scale(scales, task, token, sizes):
    return tl.load(scales + task * tl.cast(sizes[0], tl.int64) + token, token < sizes[0], 0.0)  # [BT]
