"""Triton: every task's scale, shift and layer norm from one read of the tokens, and their gradients.

The fewest bytes forward are one read of the tokens and T writes, or 2 T with the norm; backward one read of the tokens
and of every gradient, and one write. A tile of rows stays in registers while the streams take turns on it, so this is
what moves; the norm adds two float32 numbers for every row and stream, its mean and 1 / std, which the forward writes
and the backward reads.

A row of p channels is held as a few pieces of equal width, a power of two as Triton wants it: 768 channels are three
pieces of 256, not 1,024 lanes. Forward, a warp has rows of its own, so no sum over channels waits for another warp.
Backward, a fixed number of programs each walk over their share of the rows and keep the sums for all parameters in
registers; every program leaves one partial row, and the rows are added in a fixed order. What the norms of G streams
need to know of a row is summed by one joint reduction. No grid comes near 2^31 programs, which Triton 3.6 would skip:
a program takes at least about 256 elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import chip, collapse, on_device
from .pieces import _channels, _group_backward, _load, _load_rows, _parameters, _rows_of, _statistics, _zeros
from .tiles import max_streams, tile


@triton.jit(do_not_specialize=["rows", "inner", "streams", "num_streams"])
def _modulate(
    tokens,
    weight,
    bias,
    norm_weight,
    norm_bias,
    modulated,
    normalized,
    statistics,
    eps,
    rows,
    inner,
    streams,
    num_streams,
    p: tl.constexpr,
    strides,
    NORM: tl.constexpr,
    INDEX: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """A tile of BR rows for ``streams`` streams, from stream ``streams * program_id(1)``; statistics (2, T, rows)."""
    first = tl.program_id(1) * streams
    channels = _channels(p, BP)
    row = (tl.program_id(0).to(INDEX) * BR + tl.arange(0, BR))[:, None]  # [BR, 1]
    real = (row < rows) | (BR == 1)
    inside = ()
    for i in tl.static_range(len(channels)):
        inside += (real & (channels[i] < p),)
    b_x = _load_rows(_rows_of(tokens, strides, first.to(tl.int64), row, inner), 0, channels, inside)  # [BR, BP] each
    zero = tl.zeros_like(row)  # every row fetches the parameters from the first-level cache, in the tokens' layout
    for stream in range(first, first + streams):
        b_w = _load(weight + stream * p + zero, channels, 1, inside)
        b_b = _load(bias + stream * p + zero, channels, 1, inside)
        number = tl.cast(stream, tl.int64) * rows + row
        b_y = ()
        for i in tl.static_range(len(channels)):
            b_y += (b_w[i] * b_x[i] + b_b[i],)
            tl.store(modulated + number * p + channels[i], b_y[i], inside[i])
        if NORM:
            b_mean, b_rest, b_inverse_std = _statistics(b_y, channels, eps, p)
            tl.store(statistics + number, b_mean + b_rest, real)
            tl.store(statistics + tl.cast(num_streams, tl.int64) * rows + number, b_inverse_std, real)
            b_gain = _load(norm_weight + zero, channels, 1, inside)
            b_shift = _load(norm_bias + zero, channels, 1, inside)
            for i in tl.static_range(len(channels)):
                b_s = (b_y[i] - b_mean - b_rest) * b_inverse_std
                tl.store(normalized + number * p + channels[i], b_s * b_gain[i] + b_shift[i], inside[i])


@triton.jit(do_not_specialize=["rows", "inner", "num_streams"])
def _modulate_backward(
    grad_modulated,
    grad_normalized,
    tokens,
    weight,
    bias,
    norm_weight,
    statistics,
    d_tokens,
    partials,
    rows,
    inner,
    num_streams,
    p: tl.constexpr,
    modulated_strides,
    normalized_strides,
    strides,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    INDEX: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every program_id(0)-th tile of BR rows, S streams from S * program_id(1) on, G of them at a time.

    d_tokens (+)= the sum over the S streams; partials[program, group] = dW and db of every stream, and with NORM the
    gradients of the norm's weight and bias. Beyond the last row and channel every gradient is 0, and 1 / std is.
    """
    n: tl.constexpr = (p + BP - 1) // BP  # pieces
    first = (tl.program_id(1) * S).to(tl.int64)
    channels, within = _channels(p, BP), ()
    for i in tl.static_range(n):
        within += (channels[i] < p,)
    parameters = _parameters(weight, bias, norm_weight, first, channels, within, p, S, NORM)
    b_sums = _zeros((2 * S + 2 * NORM) * n, BR, BP)
    first_row = tl.program_id(0).to(INDEX) * BR
    step = tl.num_programs(0) * BR
    for begin in tl.range(first_row, rows, step, num_stages=STAGES, disable_licm=True):  # hoisted addresses would spill
        row = (begin + tl.arange(0, BR))[:, None]  # [BR, 1]
        real = (row < rows) | (BR == 1)
        inside, b_dx = (), _zeros(n, BR, BP)
        for i in tl.static_range(n):
            inside += (real & within[i],)
        b_x = _load_rows(_rows_of(tokens, strides, first, row, inner), 0, channels, inside)
        modulated = _rows_of(grad_modulated, modulated_strides, 0, row, inner)
        normalized = _rows_of(grad_normalized, normalized_strides, 0, row, inner)
        b_next, b_d_norm = (), b_sums[2 * S * n :]
        for g in tl.static_range(0, S, G):
            b_dx, b_stream_sums, b_d_norm = _group_backward(
                b_dx, b_sums[2 * g * n : 2 * min(g + G, S) * n], b_d_norm, b_x, parameters, modulated, normalized,
                statistics, first, row, rows, num_streams, channels, inside, real, p, g, min(g + G, S), NORM,
            )  # fmt: skip
            b_next += b_stream_sums
        b_sums = b_next + b_d_norm
        # shared tokens have one gradient; tokens in streams, a stream's
        target = d_tokens + (tl.program_id(1).to(tl.int64) * rows + row) * p
        for i in tl.static_range(n):
            b_out = b_dx[i]
            if ADD:
                b_out += tl.load(target + channels[i], inside[i], 0.0)
            tl.store(target + channels[i], b_out, inside[i])
    group = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    for k in tl.static_range(2 * S + 2 * NORM):
        for i in tl.static_range(n):
            channel = i * BP + tl.arange(0, BP)
            target = partials + (group * (2 * S + 2 * NORM) + k) * p + channel
            tl.store(target, tl.sum(b_sums[k * n + i], 0), channel < p)


def modulate(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, N, p) or (T, B, N, p), (T, p), (T, p) -> (T, B, N, p)."""
    return _forward(tokens, weight, bias)[0]


def modulate_layer_norm(
    tokens: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, its layer norm, and the statistics of that (2, T, B, N): mean and 1 / std."""
    return _forward(tokens, weight, bias, (norm_weight, norm_bias), eps)


def modulate_backward(grad: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """(T, B, N, p) -> gradients of tokens, weight and bias."""
    d_tokens, sums = _backward((grad, grad), tokens, weight, weight)
    return d_tokens, *(x.to(weight.dtype) for x in sums.unbind(1))


def modulate_layer_norm_backward(
    grad_modulated: Tensor,
    grad_normalized: Tensor,
    statistics: Tensor,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of tokens, weight, bias, norm_weight and norm_bias."""
    d_tokens, sums = _backward((grad_modulated, grad_normalized), tokens, weight, bias, (norm_weight, statistics))
    d_weight, d_bias, d_norm_weight, d_norm_bias = sums.unbind(1)
    d_norm = (d_norm_weight.sum(0).to(norm_weight.dtype), d_norm_bias.sum(0).to(norm_weight.dtype))
    return d_tokens, d_weight.to(weight.dtype), d_bias.to(weight.dtype), *d_norm


def _rows(*tensors: Tensor) -> tuple[list[Tensor], list[tuple[int, ...]], int]:
    """(B, N, p) or (T, B, N, p) each: tensors whose rows two strides address, their four strides, one inner size."""
    views = [collapse(x, keep=x.dim() - 3) for x in tensors]
    inner = min(x.shape[-2] for x in views)
    strides: list[tuple[int, ...]] = []
    for x in views:
        stream = x.stride(0) if x.dim() == 4 else 0
        outer = x.stride(-3) if x.shape[-2] == inner else inner * x.stride(-2)
        strides.append((stream, outer, x.stride(-2), x.stride(-1)))
    return views, strides, inner


def _index(rows: int) -> tl.dtype:
    """What rows are counted in: 32 bits, which divide fast, where a step past the last row still fits."""
    return tl.int32 if rows < 2**30 else tl.int64


def _forward(
    tokens: Tensor, weight: Tensor, bias: Tensor, norm: tuple[Tensor, ...] = (), eps: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    num_streams, p = weight.shape
    modulated = torch.empty(num_streams, *tokens.shape[-3:], dtype=tokens.dtype, device=tokens.device)
    rows = tokens.shape[-3:-1].numel()
    normalized, statistics = modulated, modulated
    if norm:
        normalized = torch.empty_like(modulated)
        statistics = modulated.new_empty((2, *modulated.shape[:-1]), dtype=torch.float32)
    if not rows:
        return modulated, normalized, statistics
    weight, bias, *norm = (x.contiguous() for x in (weight, bias, *norm))
    (x,), (strides,), inner = _rows(tokens)
    in_program, groups = (num_streams, 1) if tokens.dim() == 3 else (1, num_streams)
    block = tile("forward", p, tokens)
    with on_device(tokens):
        _modulate[(triton.cdiv(rows, block.rows), groups)](
            *(x, weight, bias),
            *(norm or (weight, bias)),
            *(modulated, normalized, statistics),
            *(eps, rows, inner, in_program, num_streams, p, strides),
            NORM=bool(norm),
            INDEX=_index(rows),
            **block.options(),
        )
    return modulated, normalized, statistics


def _backward(
    grads: tuple[Tensor, Tensor],
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Gradient of the tokens, and float32 (T, 2 or 4, p): of weight, bias, the norm's weight and bias.

    Args:
        norm: its weight, and the statistics that the forward left; nothing where there is no norm.
    """
    (num_streams, p), slots = weight.shape, 4 if norm else 2
    sums = torch.zeros(num_streams, slots, p, dtype=torch.float32, device=tokens.device)
    if not tokens.numel():
        return torch.zeros_like(tokens, memory_format=torch.contiguous_format), sums
    vectors = (weight.contiguous(), bias.contiguous())
    gain, statistics = (norm[0].contiguous(), norm[1].contiguous()) if norm else (vectors[0], None)
    if tokens.dim() == 4:
        d_tokens = torch.empty_like(tokens, memory_format=torch.contiguous_format)
        partials = _launch_backward(grads, tokens, vectors, gain, statistics, d_tokens)
        return d_tokens, partials.sum(0)
    launches = triton.cdiv(num_streams, max_streams(p, tokens, bool(norm)))
    dtype = tokens.dtype if launches == 1 else torch.float32
    d_tokens = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    for i in range(launches):
        streams = slice(num_streams * i // launches, num_streams * (i + 1) // launches)
        parts = tuple(grad[streams] for grad in grads), tokens, tuple(x[streams] for x in vectors)
        part_statistics = None if statistics is None else statistics[:, streams]
        partials = _launch_backward(*parts, gain, part_statistics, d_tokens, add=i > 0).sum(0)[0]  # (2 S + 0 or 2, p)
        count = streams.stop - streams.start
        sums[streams, :2] = partials[: 2 * count].view(count, 2, p)
        if norm:
            sums[streams.start, 2:] = partials[2 * count :]
    return d_tokens.to(tokens.dtype), sums


def _launch_backward(
    grads: tuple[Tensor, ...],
    tokens: Tensor,
    vectors: tuple[Tensor, ...],
    gain: Tensor,
    statistics: Tensor | None,
    d_tokens: Tensor,
    add: bool = False,
) -> Tensor:
    """Fill d_tokens; partial sums (programs, groups, 2 S + 0 or 2, p). All shared streams are one group of S."""
    num_streams, p = vectors[0].shape
    norm, all_streams = False, 0
    if statistics is not None:
        norm, all_streams = True, statistics.stride(0) // tokens.shape[-3:-1].numel()
    groups, in_group = (1, num_streams) if tokens.dim() == 3 else (num_streams, 1)
    rows, block = tokens.shape[-3:-1].numel(), tile("backward", p, tokens, in_group, norm)
    wanted = triton.cdiv(block.resident * chip(tokens.device).multiprocessors, groups)
    programs = min(wanted, triton.cdiv(rows, block.rows))
    partials = torch.empty(programs, groups, 2 * in_group + 2 * norm, p, dtype=torch.float32, device=tokens.device)
    (x, *up), (strides, *up_strides), inner = _rows(tokens, *grads)
    with on_device(tokens):
        _modulate_backward[(programs, groups)](
            *(*up, x, *vectors, gain, statistics if norm else gain, d_tokens, partials),
            *(rows, inner, all_streams, p, *up_strides, strides),
            NORM=norm,
            ADD=add,
            INDEX=_index(rows),
            S=in_group,
            **block.options(),
        )
    return partials
