"""Triton: rows of channels as pieces of equal width, a power of two: loads, sums and the norm of them."""

import triton
import triton.language as tl

from ..launch import interpreted

# NumPy, of which Triton's interpreter is made, adds up one by one what does not lie side by side
JOINT = tl.constexpr(not interpreted())


@triton.jit
def _rows_of(pointer, strides, stream, row, inner):
    """Where rows of a stream begin, [rows, 1], and how far apart streams and channels are.

    Args:
        strides: as (stream, outer, inner, p).
    """
    start = pointer + stream * strides[0]
    offset = (row // inner).to(tl.int64) * strides[1] + (row % inner).to(tl.int64) * strides[2]
    return start + offset, strides[0], strides[3]


@triton.jit
def _channels(p: tl.constexpr, BP: tl.constexpr):
    """Of every piece of a row of p channels, [1, BP] each."""
    channels = ()
    for i in tl.static_range((p + BP - 1) // BP):
        channels += ((i * BP + tl.arange(0, BP))[None, :],)
    return channels


@triton.jit
def _zeros(COUNT: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr):
    pieces = ()
    for _ in tl.static_range(COUNT):
        pieces += (tl.zeros([BR, BP], tl.float32),)
    return pieces


@triton.jit
def _load(start, channels, stride, inside):
    """The pieces of rows, float32 [rows, BP] each; ``start`` is [rows, 1]."""
    pieces = ()
    for i in tl.static_range(len(channels)):
        pieces += (tl.load(start + channels[i] * stride, inside[i], 0.0).to(tl.float32),)
    return pieces


@triton.jit
def _load_rows(rows_of, further, channels, inside):
    """The pieces of the rows of ``_rows_of``, or of those so many streams further."""
    start, stride_stream, stride_channel = rows_of
    return _load(start + tl.cast(further, tl.int64) * stride_stream, channels, stride_channel, inside)


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


@triton.jit
def _parameters(
    weight, bias, norm_weight, first, channels, within, p: tl.constexpr, S: tl.constexpr, NORM: tl.constexpr
):
    """W of S streams from ``first`` on and, where there is a norm, b and the norm's weight, in pieces [1, BP] each."""
    b_w, b_b, b_gain = (), (), ()
    for s in tl.static_range(S):
        b_w += (_load(weight + (first + s) * p, channels, 1, within),)
        if NORM:
            b_b += (_load(bias + (first + s) * p, channels, 1, within),)
    if NORM:
        b_gain = _load(norm_weight, channels, 1, within)
    return b_w, b_b, b_gain


@triton.jit
def _group_backward(
    b_dx,
    b_sums,
    b_d_norm,
    b_x,
    parameters,
    modulated,
    normalized,
    statistics,
    first,
    row,
    rows,
    num_streams,
    channels,
    inside,
    real,
    p: tl.constexpr,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    NORM: tl.constexpr,
):
    """What the streams from BEGIN to END of a tile of rows add to dx, to dW and db of each, and to the norm's sums."""
    b_w, b_b, b_gain = parameters
    n: tl.constexpr = len(b_x)
    b_partial, b_s, b_row_sums, inverse = (), (), (), ()
    for s in tl.static_range(BEGIN, END):
        b_dy = _load_rows(modulated, first + s, channels, inside)
        if NORM:
            b_dz = _load_rows(normalized, first + s, channels, inside)
            pointer = statistics + (first + s) * rows + row
            b_mean = tl.load(pointer, real, 0.0)
            b_inverse_std = tl.load(pointer + tl.cast(num_streams, tl.int64) * rows, real, 0.0)
            b_dy, b_s_stream, b_stream_sums, b_d_norm = _normalized_backward(
                b_x, b_w[s], b_b[s], b_dy, b_dz, b_gain, b_mean, b_inverse_std, b_d_norm
            )
            b_s += (b_s_stream,)
            b_row_sums += b_stream_sums
            inverse += (b_inverse_std * (1.0 / p),)
        b_partial += (b_dy,)
    if NORM:
        b_row_sums = _sums(b_row_sums)
    b_next = ()
    for k in tl.static_range(END - BEGIN):
        b_dy = b_partial[k]
        if NORM:
            b_dy = _less_means(b_dy, b_s[k], b_row_sums[2 * k] * inverse[k], b_row_sums[2 * k + 1] * inverse[k])
        b_d_weight, b_d_bias = b_sums[2 * k * n : (2 * k + 1) * n], b_sums[(2 * k + 1) * n : (2 * k + 2) * n]
        b_dx, b_d_weight, b_d_bias = _add_stream(b_dx, b_d_weight, b_d_bias, b_dy, b_x, b_w[BEGIN + k])
        b_next += b_d_weight + b_d_bias
    return b_dx, b_next, b_d_norm


@triton.jit
def _less_means(b_dy, b_s, mean, slope):
    """dy - mean - s * slope, in pieces: the two means of a row that ``_normalized_backward`` leaves to be taken off."""
    b_less = ()
    for i in tl.static_range(len(b_dy)):
        b_less += (b_dy[i] - mean - b_s[i] * slope,)
    return b_less
