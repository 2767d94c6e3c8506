"""Triton: every task's scale, shift and layer norm from one read of the tokens, and their gradients.

The fewest bytes forward are one read of the tokens and T writes, or 2 T with the norm; backward one read of the tokens
and of every gradient, and one write. A tile of rows stays in registers while the streams take turns on it, so this is
what moves; the parameters come from the first-level cache. Backward, a fixed number of programs each walk over their
share of the rows and keep the sums for all parameters in registers; every program leaves one partial row, and the rows
are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import chip, collapse, on_device


@triton.jit
def _offset(row, inner, strides):
    """Of a row of (stream, outer, inner, p), as ``collapse`` leaves it."""
    return (row // inner).to(tl.int64) * strides[1] + (row % inner).to(tl.int64) * strides[2]


@triton.jit
def _standardise(b_y, within, p, eps):
    """Rows of mean 0 and variance 1, and 1 / std: variance of what is left after the mean, which may be large."""
    b_centred = tl.where(within, b_y - (tl.sum(b_y, 1) / p)[:, None], 0.0)
    inverse_std = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, 1) / p + eps)
    return b_centred * inverse_std[:, None], inverse_std


@triton.jit(do_not_specialize=["rows", "inner", "streams"])
def _modulate(
    tokens,
    weight,
    bias,
    norm_weight,
    norm_bias,
    modulated,
    normalized,
    eps,
    rows,
    inner,
    streams,
    p,
    strides,
    NORM: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """A tile of BR rows for ``streams`` streams, from stream ``streams * program_id(1)``."""
    first = tl.program_id(1) * streams
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    channel = tl.arange(0, BP)  # [BP]
    inside = (row < rows)[:, None] & (channel < p)[None, :]
    start = tokens + first.to(tl.int64) * strides[0] + _offset(row, inner, strides)[:, None]
    b_x = tl.load(start + channel[None, :] * strides[3], inside, 0.0).to(tl.float32)  # [BR, BP]
    if NORM:
        b_gain = tl.load(norm_weight + channel, channel < p, 0.0).to(tl.float32)[None, :]
        b_shift = tl.load(norm_bias + channel, channel < p, 0.0).to(tl.float32)[None, :]
    for stream in range(first, first + streams):
        b_w = tl.load(weight + stream * p + channel, channel < p, 0.0).to(tl.float32)[None, :]
        b_b = tl.load(bias + stream * p + channel, channel < p, 0.0).to(tl.float32)[None, :]
        b_y = b_w * b_x + b_b
        place = (tl.cast(stream, tl.int64) * rows + row)[:, None] * p + channel[None, :]
        tl.store(modulated + place, b_y, inside)
        if NORM:
            b_s, _ = _standardise(b_y, (channel < p)[None, :], p, eps)
            tl.store(normalized + place, b_s * b_gain + b_shift, inside)


@triton.jit(do_not_specialize=["rows", "inner", "inner_modulated", "inner_normalized"])
def _modulate_backward(
    grad_modulated,
    grad_normalized,
    tokens,
    weight,
    bias,
    norm_weight,
    d_tokens,
    partials,
    eps,
    rows,
    inner,
    inner_modulated,
    inner_normalized,
    p,
    modulated_strides,
    normalized_strides,
    strides,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    S: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every program_id(0)-th tile of BR rows, S streams from S * program_id(1) on.

    d_tokens (+)= the sum over the S streams; partials[program, group] = dW of S streams, db of S, and with NORM the
    gradients of the norm's weight and bias.
    """
    channel = tl.arange(0, BP)  # [BP]
    first = tl.program_id(1) * S
    columns = channel[None, :]
    b_sums = ()  # [BR, BP] each
    for _ in tl.static_range(2 * S + 2 * NORM):
        b_sums += (tl.zeros([BR, BP], tl.float32),)
    for begin in tl.range(tl.program_id(0).to(tl.int64) * BR, rows, tl.num_programs(0) * BR, num_stages=STAGES):
        row = begin + tl.arange(0, BR)  # [BR]
        inside = (row < rows)[:, None] & (columns < p)
        start = tokens + first.to(tl.int64) * strides[0] + _offset(row, inner, strides)[:, None]
        b_x = tl.load(start + columns * strides[3], inside, 0.0).to(tl.float32)  # [BR, BP]
        row_modulated = _offset(row, inner_modulated, modulated_strides)[:, None] + columns * modulated_strides[3]
        row_normalized = _offset(row, inner_normalized, normalized_strides)[:, None] + columns * normalized_strides[3]
        b_dx = tl.zeros([BR, BP], tl.float32)
        b_next, b_next_bias = (), ()
        if NORM:
            b_gain = tl.load(norm_weight + channel, channel < p, 0.0).to(tl.float32)[None, :]
            b_d_gain, b_d_shift = b_sums[2 * S], b_sums[2 * S + 1]
        for s in tl.static_range(S):
            b_w = tl.load(weight + (first + s) * p + channel, channel < p, 0.0).to(tl.float32)[None, :]
            stream = (first + s).to(tl.int64)
            b_dy = tl.load(grad_modulated + stream * modulated_strides[0] + row_modulated, inside, 0.0).to(tl.float32)
            if NORM:
                b_b = tl.load(bias + (first + s) * p + channel, channel < p, 0.0).to(tl.float32)[None, :]
                b_s, inverse_std = _standardise(b_w * b_x + b_b, columns < p, p, eps)
                b_dz = tl.load(grad_normalized + stream * normalized_strides[0] + row_normalized, inside, 0.0)
                b_dz = b_dz.to(tl.float32)
                b_ds = b_dz * b_gain
                mean, slope = tl.sum(b_ds, 1) / p, tl.sum(b_ds * b_s, 1) / p
                b_dy += (b_ds - mean[:, None] - b_s * slope[:, None]) * inverse_std[:, None]
                b_dy = tl.where(inside, b_dy, 0.0)  # the mean is subtracted beyond the last channel too
                b_d_gain += tl.where(inside, b_dz * b_s, 0.0)  # beyond the last row a standard deviation may be 0
                b_d_shift += b_dz
            b_dx += b_w * b_dy
            b_next += (b_sums[s] + b_dy * b_x,)
            b_next_bias += (b_sums[S + s] + b_dy,)
        b_sums = b_next + b_next_bias
        if NORM:
            b_sums += (b_d_gain, b_d_shift)
        # shared tokens have one gradient; tokens in streams, a stream's
        place = d_tokens + (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * p + columns
        if ADD:
            b_dx += tl.load(place, inside, 0.0)
        tl.store(place, b_dx, inside)
    group = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    for i in tl.static_range(2 * S + 2 * NORM):
        place = partials + (group * (2 * S + 2 * NORM) + i) * p + channel
        tl.store(place, tl.sum(b_sums[i], 0), channel < p)


def modulate(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, N, p) or (T, B, N, p), (T, p), (T, p) -> (T, B, N, p)."""
    return _forward(tokens, weight, bias)[0]


def modulate_layer_norm(
    tokens: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same, and its layer norm."""
    return _forward(tokens, weight, bias, (norm_weight, norm_bias), eps)


def modulate_backward(grad: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """(T, B, N, p) -> gradients of tokens, weight and bias."""
    d_tokens, sums = _backward((grad, grad), tokens, weight, weight)
    return d_tokens, *(x.to(weight.dtype) for x in sums.unbind(1))


def modulate_layer_norm_backward(
    grad_modulated: Tensor,
    grad_normalized: Tensor,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of tokens, weight, bias, norm_weight and norm_bias."""
    d_tokens, sums = _backward((grad_modulated, grad_normalized), tokens, weight, bias, norm_weight, eps)
    d_weight, d_bias, d_norm_weight, d_norm_bias = sums.unbind(1)
    d_norm = (d_norm_weight.sum(0).to(norm_weight.dtype), d_norm_bias.sum(0).to(norm_weight.dtype))
    return d_tokens, d_weight.to(weight.dtype), d_bias.to(weight.dtype), *d_norm


def _streams(x: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    """(B, N, p) or (T, B, N, p): a tensor whose rows two strides address, its four strides, its inner size."""
    if x.dim() == 3:
        x = collapse(x)
        return x, (0, *x.stride()), x.shape[1]
    x = collapse(x, keep=1)
    return x, x.stride(), x.shape[2]


def _forward(
    tokens: Tensor, weight: Tensor, bias: Tensor, norm: tuple[Tensor, ...] = (), eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    num_streams, p = weight.shape
    outputs = [torch.empty(num_streams, *tokens.shape[-3:], dtype=tokens.dtype, device=tokens.device)]
    outputs = [*outputs, torch.empty_like(outputs[0])] if norm else outputs * 2
    weight, bias, *norm = (x.contiguous() for x in (weight, bias, *norm))
    x, strides, inner = _streams(tokens)
    rows = tokens.shape[-3:-1].numel()
    in_program, groups = (num_streams, 1) if tokens.dim() == 3 else (1, num_streams)
    tile, block = _tile(p, 2048)
    if rows:
        with on_device(tokens):
            _modulate[(triton.cdiv(rows, tile), groups)](
                *(x, weight, bias),
                *(norm or (weight, bias)),
                *outputs,
                *(eps, rows, inner, in_program, p, strides),
                NORM=bool(norm),
                BR=tile,
                BP=block,
                num_warps=4 if block <= 2048 else 8,
                maxnreg=128,
            )
    return outputs[0], outputs[1]


def _backward(
    grads: tuple[Tensor, Tensor],
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Gradient of the tokens, and float32 (T, 2 or 4, p): of weight, bias, the norm's weight and bias."""
    (num_streams, p), slots = weight.shape, 2 if norm_weight is None else 4
    sums = torch.zeros(num_streams, slots, p, dtype=torch.float32, device=tokens.device)
    if not tokens.numel():
        return torch.zeros_like(tokens, memory_format=torch.contiguous_format), sums
    vectors = (weight.contiguous(), bias.contiguous())
    gain = vectors[0] if norm_weight is None else norm_weight.contiguous()
    if tokens.dim() == 4:
        d_tokens = torch.empty_like(tokens, memory_format=torch.contiguous_format)
        partials = _launch_backward(grads, tokens, vectors, gain, eps, d_tokens, slots)
        return d_tokens, partials.sum(0)
    # the sums of five streams of 1,024 channels are what the registers of a multiprocessor hold
    tile, block = _tile(p, 1024)
    launches = triton.cdiv(num_streams, max(1, 5 * 1024 // (tile * block)))
    dtype = tokens.dtype if launches == 1 else torch.float32
    d_tokens = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    for i in range(launches):
        own = slice(num_streams * i // launches, num_streams * (i + 1) // launches)
        parts = tuple(grad[own] for grad in grads), tokens, tuple(x[own] for x in vectors)
        found = _launch_backward(*parts, gain, eps, d_tokens, slots, add=i > 0).sum(0)[0]  # (2 S + 0 or 2, p)
        count = own.stop - own.start
        sums[own, :2] = found[: 2 * count].view(2, count, p).transpose(0, 1)
        if slots == 4:
            sums[own.start, 2:] = found[2 * count :]
    return d_tokens.to(tokens.dtype), sums


def _launch_backward(
    grads: tuple[Tensor, ...],
    tokens: Tensor,
    vectors: tuple[Tensor, ...],
    gain: Tensor,
    eps: float,
    d_tokens: Tensor,
    slots: int,
    add: bool = False,
) -> Tensor:
    """Fill d_tokens; partial sums (programs, groups, 2 S + 0 or 2, p). All shared streams are one group of S."""
    num_streams, p = vectors[0].shape
    groups, in_group = (1, num_streams) if tokens.dim() == 3 else (num_streams, 1)
    rows, (tile, block) = tokens.shape[-3:-1].numel(), _tile(p, 1024)
    resident = max(1, 8 // (1 + in_group)) if block <= 1024 else 1  # programs, by the registers each takes
    wanted = triton.cdiv(resident * chip(tokens.device).multiprocessors, groups)
    programs = min(wanted, triton.cdiv(rows, tile))
    partials = torch.empty(programs, groups, 2 * in_group + slots - 2, p, dtype=torch.float32, device=tokens.device)
    (x, strides, inner), (gm, gm_strides, gm_inner), (gn, gn_strides, gn_inner) = map(_streams, (tokens, *grads))
    # the next rows are fetched while these are worked on, if there is room: the parameters are fetched with them
    staged = tile * block * (x.element_size() * (1 + in_group * slots // 2) + 8 * in_group)
    with on_device(tokens):
        _modulate_backward[(programs, groups)](
            *(gm, gn, x, *vectors, gain, d_tokens, partials),
            *(eps, rows, inner, gm_inner, gn_inner, p, gm_strides, gn_strides, strides),
            NORM=slots == 4,
            ADD=add,
            S=in_group,
            BR=tile,
            BP=block,
            STAGES=2 if 2 * staged * resident <= chip(tokens.device).shared_memory else 1,
            num_warps=8,
            maxnreg=240,
        )
    return partials


def _tile(p: int, elements: int) -> tuple[int, int]:
    """Rows and channels of a tile of as many elements: one row at least, all channels of it."""
    block = triton.next_power_of_2(p)
    return max(1, elements // block), block
