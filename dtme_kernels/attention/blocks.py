"""Triton: what the attention kernels share: a program's place, its tiles, and what of the scores is hidden."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# of a problem, not of a model: no number of them gets a kernel of its own
SIZES = ["all_rows", "images", "queries", "keys", "task_keys"]


@triton.jit
def load(start, row, stride, rows, D: tl.constexpr, BD: tl.constexpr, BOUNDED: tl.constexpr):
    """[rows, BD] of a matrix with D contiguous channels, zeros outside."""
    channel = tl.arange(0, BD)[None, :]
    place = start + row.to(tl.int64)[:, None] * stride + channel
    if BOUNDED:
        return tl.load(place, (row < rows)[:, None] & (channel < D), 0.0)
    if D < BD:
        return tl.load(place, channel < D, 0.0)
    return tl.load(place)


@triton.jit
def store(start, row, stride, rows, b_x, D: tl.constexpr, BD: tl.constexpr):
    channel = tl.arange(0, BD)[None, :]
    place = start + row.to(tl.int64)[:, None] * stride + channel
    tl.store(place, b_x, (row < rows)[:, None] & (channel < D))


@triton.jit
def hide(b_s, scale, mask, strides, row, column, rows, columns, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Hide what is not visible. Scores as the product left them, or, with an additive mask, times ``scale``.

    row and column: of the scores, shaped to broadcast to them either way round.
    """
    if MASK != "":
        place = mask + row.to(tl.int64) * strides[3] + column.to(tl.int64) * strides[4]
        inside = (row < rows) & (column < columns)
        if MASK == "bool":
            b_s = tl.where(tl.load(place, inside, 0) != 0, b_s, float("-inf"))
        else:
            b_mask = tl.load(place, inside, 0.0).to(tl.float32)
            # the lowest finite number stays one in units of log 2: a row of them is visible, if nothing else is
            b_mask = tl.where(b_mask == float("-inf"), b_mask, tl.maximum(b_mask * LOG2E, -3.4e38))
            b_s = b_s * scale + b_mask
    b_s = tl.where(column < columns, b_s, float("-inf"))
    if CAUSAL:
        b_s = tl.where(column <= row, b_s, float("-inf"))
    return b_s


@triton.jit
def load_statistics(statistics, place, all_rows, inside, EXACT: tl.constexpr):
    """What to subtract from a score, and what to multiply its exponential by, to have a probability.

    Their sum rounds, which float32 would notice: there the two stay apart.
    """
    b_most = tl.load(statistics + place, inside, float("inf"))
    b_sum = tl.load(statistics + all_rows + place, inside, 1.0)
    if EXACT:
        return b_most, 1.0 / b_sum
    return b_most + tl.log2(b_sum), b_sum


@triton.jit
def span(part, first, keys, task_keys, CHECKED: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Keys of a part of the loop for BM queries from ``first``: 0, all visible; 1, to be looked at; 2, task keys."""
    low, high = keys // BN * BN, keys
    if CAUSAL:
        low, high = tl.minimum(keys, first + 1) // BN * BN, tl.minimum(keys, first + BM)
    if CHECKED:
        low = 0
    begin = low if part == 1 else 0
    end = low if part == 0 else high if part == 1 else task_keys
    return begin, end


@triton.jit
def place_of(BLOCKS, heads, CAUSAL: tl.constexpr):
    """Block, head and row (stream and image) of a program; under a causal mask the longest loops start first."""
    block, rest = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    if CAUSAL:
        block = BLOCKS - 1 - block
    return block, rest % heads, (rest // heads).to(tl.int64)
