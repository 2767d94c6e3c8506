"""Triton: rows of channels as pieces of equal width, a power of two: loads, sums and the norm of them."""

import triton
import triton.language as tl

from ..launch import interpreted

# NumPy, of which Triton's interpreter is made, adds up one by one what does not lie side by side
JOINT = tl.constexpr(not interpreted())


@triton.jit
def _offset(row, inner, strides):
    """Of a row of (stream, outer, inner, p), as ``collapse`` leaves it."""
    return (row // inner).to(tl.int64) * strides[1] + (row % inner).to(tl.int64) * strides[2]


@triton.jit
def _channels(p: tl.constexpr, BP: tl.constexpr):
    """Of every piece of a row of p channels, [1, BP] each."""
    channels = ()
    for i in tl.static_range((p + BP - 1) // BP):
        channels += ((i * BP + tl.arange(0, BP))[None, :],)
    return channels


@triton.jit
def _load(start, channels, stride, inside):
    """The pieces of rows, float32 [rows, BP] each; ``start`` is [rows, 1]."""
    pieces = ()
    for i in tl.static_range(len(channels)):
        pieces += (tl.load(start + channels[i] * stride, inside[i], 0.0).to(tl.float32),)
    return pieces


@triton.jit
def _sums(parts):
    """The sums over the channels of a power of two of tensors, [rows, 1] each, by one reduction of all together."""
    count: tl.constexpr = len(parts)
    if not JOINT:
        sums = ()
        for i in tl.static_range(count):
            sums += (tl.sum(parts[i], 1)[:, None],)
        return sums
    levels: tl.constexpr = (count > 1) + (count > 2) + (count > 4)
    stack = parts
    for _ in tl.static_range(levels):
        joined = ()
        for i in tl.static_range(len(stack) // 2):
            joined += (tl.join(stack[2 * i], stack[2 * i + 1]),)
        stack = joined
    stack = (tl.sum(stack[0], 1),)
    for _ in tl.static_range(levels):
        parted = ()
        for i in tl.static_range(len(stack)):
            parted += tl.split(stack[i])
        stack = parted
    sums = ()
    for i in tl.static_range(count):
        sums += (stack[i][:, None],)
    return sums


@triton.jit
def _statistics(pieces, channels, eps, p: tl.constexpr):
    """Mean of rows of p channels, what rounding took from it, and 1 / std; [rows, 1] each.

    The variance is taken of what is left after the mean, which may be large. The mean of that, a part of the last digit
    of the mean, may be much where deviations are far smaller.
    """
    b_sum = pieces[0]
    for i in tl.static_range(1, len(pieces)):
        b_sum += pieces[i]
    b_mean = tl.sum(b_sum, 1)[:, None] * (1.0 / p)
    b_sum, b_square = tl.zeros_like(b_sum), tl.zeros_like(b_sum)
    for i in tl.static_range(len(pieces)):
        b_centred = tl.where(channels[i] < p, pieces[i] - b_mean, 0.0)
        b_sum += b_centred
        b_square += b_centred * b_centred
    b_sum, b_square = _sums((b_sum, b_square))
    b_rest = b_sum * (1.0 / p)
    b_variance = tl.maximum(b_square * (1.0 / p) - b_rest * b_rest, 0.0)
    return b_mean, b_rest, 1.0 / tl.sqrt_rn(b_variance + eps)


@triton.jit
def _normalized_backward(b_x, b_w, b_b, b_dy, b_dz, b_gain, b_mean, b_inverse_std, b_d_norm):
    """Of one stream's pieces: dy but for two means of the row, s, what these are the sums of, and sums for the norm.

    With s = (y - mean) / std and ds = gain dz, dy += (ds - mean ds - s mean(ds s)) / std.
    """
    b_partial, b_s, b_d_gain, b_d_shift = (), (), (), ()
    b_sum, b_product = tl.zeros_like(b_x[0]), tl.zeros_like(b_x[0])
    for i in tl.static_range(len(b_x)):
        b_s += ((b_w[i] * b_x[i] + b_b[i] - b_mean) * b_inverse_std,)
        b_ds = b_dz[i] * b_gain[i]
        b_sum += b_ds
        b_product += b_ds * b_s[i]
        b_partial += (b_dy[i] + b_ds * b_inverse_std,)
        b_d_gain += (b_d_norm[i] + b_dz[i] * b_s[i],)
        b_d_shift += (b_d_norm[len(b_x) + i] + b_dz[i],)
    return b_partial, b_s, (b_sum, b_product), b_d_gain + b_d_shift


@triton.jit
def _add_stream(b_dx, b_d_weight, b_d_bias, b_dy, b_x, b_w):
    """What one stream's dy adds to dx, dW and db, in pieces."""
    b_next_dx, b_next_weight, b_next_bias = (), (), ()
    for i in tl.static_range(len(b_x)):
        b_next_dx += (b_dx[i] + b_w[i] * b_dy[i],)
        b_next_weight += (b_d_weight[i] + b_dy[i] * b_x[i],)
        b_next_bias += (b_d_bias[i] + b_dy[i],)
    return b_next_dx, b_next_weight, b_next_bias
