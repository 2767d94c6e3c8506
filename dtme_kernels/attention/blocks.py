"""Triton: what the attention kernels share: a program's place, its tiles, and what of the scores is hidden.

A *matrix* is a pair: where its first row starts, and how far apart its rows lie. Its channels lie side by side.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# The sizes of a problem and the strides of its tensors do not get kernels of their own. Triton would compile another
# one for every combination of those that are 1 or divide by 16.
UNSPECIALIZED = ["sizes", "strides"]


@triton.jit
def matrix_of(tensor, strides, row, head, UNIT: tl.constexpr = 8):
    """The matrix of a row (stream and image) and a head. ``strides``, of row, head and token, count UNIT elements.

    All tensors have strides that divide by 8: told so, the compiler reads 16 bytes at a time, also with 72 channels.
    """
    start = tensor + (row * strides[0] + tl.cast(head, tl.int64) * strides[1]) * UNIT
    return start, tl.cast(strides[2], tl.int64) * UNIT


@triton.jit
def load(matrix, row, rows, D: tl.constexpr, BD: tl.constexpr, BOUNDED: tl.constexpr):
    """[rows, BD] of a matrix with D channels, zeros outside; filled up with zeros to 8 channels, so is its memory."""
    channel = tl.arange(0, BD)[None, :]
    pointer = matrix[0] + row.to(tl.int64)[:, None] * matrix[1] + channel
    CHANNELS: tl.constexpr = (D + 7) // 8 * 8
    if BOUNDED:
        return tl.load(pointer, (row < rows)[:, None] & (channel < CHANNELS), 0.0)
    if CHANNELS < BD:
        return tl.load(pointer, channel < CHANNELS, 0.0)
    return tl.load(pointer)


@triton.jit
def load_keys(shared, task, n, keys, end, D: tl.constexpr, BD: tl.constexpr, PART: tl.constexpr, JOINED: tl.constexpr):
    """Rows n of [shared ; task], of which the first ``keys`` are shared: [BN, BD], zeros from ``end`` on.

    Parts 0 and 1 are of shared keys only; part 2 is of task keys only, unless the last shared keys join them.
    """
    if PART < 2:
        return load(shared, n, end, D, BD, PART > 0)
    if not JOINED:
        return load(task, n - keys, end - keys, D, BD, True)
    channel = tl.arange(0, BD)[None, :]
    start = tl.where(
        n < keys, shared[0] + n.to(tl.int64) * shared[1], task[0] + (n - keys).to(tl.int64) * task[1]
    )  # fmt: skip
    return tl.load(start[:, None] + channel, (n < end)[:, None] & (channel < (D + 7) // 8 * 8), 0.0)


@triton.jit
def store(matrix, row, rows, b_x, D: tl.constexpr, BD: tl.constexpr):
    """Rows from 0 to ``rows``; others are left out."""
    channel = tl.arange(0, BD)[None, :]
    pointer = matrix[0] + row.to(tl.int64)[:, None] * matrix[1] + channel
    tl.store(pointer, b_x, ((row >= 0) & (row < rows))[:, None] & (channel < D))


@triton.jit
def hide(b_s, scale, mask, strides, row, column, rows, columns, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Hide what is not visible. Scores as the product left them, or, with an additive mask, times ``scale``.

    row and column: of the scores, shaped to broadcast to them either way round.
    """
    if MASK != "":
        pointer = mask + row.to(tl.int64) * strides[3] + column.to(tl.int64) * strides[4]
        inside = (row < rows) & (column < columns)
        if MASK == "bool":
            b_s = tl.where(tl.load(pointer, inside, 0) != 0, b_s, float("-inf"))
        else:
            b_mask = tl.load(pointer, inside, 0.0).to(tl.float32)
            # the lowest finite number stays one in units of log 2: a row of them is visible, if nothing else is
            b_mask = tl.where(b_mask == float("-inf"), b_mask, tl.maximum(b_mask * LOG2E, -3.4e38))
            b_s = b_s * scale + b_mask
    b_s = tl.where(column < columns, b_s, float("-inf"))
    if CAUSAL:
        b_s = tl.where(column <= row, b_s, float("-inf"))
    return b_s


@triton.jit
def store_statistics(statistics, query, all_rows, inside, b_most, b_sum, EXACT: tl.constexpr):
    """What finds a query's probabilities again: its log-sum-exp in units of log 2, +inf where it sees no key.

    The log-sum-exp of large scores rounds, which float32 would notice: there the greatest score and the inverse of the
    sum stay apart, in two rows.
    """
    if EXACT:
        tl.store(statistics + query, tl.where(b_sum == 0.0, float("inf"), b_most), inside)
        tl.store(statistics + all_rows + query, 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum), inside)
    else:
        tl.store(statistics + query, tl.where(b_sum == 0.0, float("inf"), b_most + tl.log2(b_sum)), inside)


@triton.jit
def load_statistics(statistics, query, all_rows, inside, EXACT: tl.constexpr):
    """What to subtract from a score, and, if EXACT, what to multiply its exponential by, to have a probability."""
    b_at = tl.load(statistics + query, inside, float("inf"))
    if EXACT:
        return b_at, tl.load(statistics + all_rows + query, inside, 1.0)
    return b_at, b_at


@triton.jit
def span(
    part,
    first,
    keys,
    task_keys,
    CHECKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    JOINED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Rows of [key ; task_key] in a part of the loop for BM queries from ``first``.

    Part 0: shared keys that all of the queries see. 1: shared keys to be looked at. 2: task keys, and with JOINED the
    last few shared keys before them.
    """
    low, high = keys // BN * BN, keys
    if CAUSAL:
        low, high = tl.minimum(keys, first + 1) // BN * BN, tl.minimum(keys, first + BM)
    if CHECKED:
        low = 0
    begin = 0 if part == 0 else low if part == 1 or JOINED else keys
    end = low if part == 0 else high if part == 1 else keys + task_keys
    return begin, end


@triton.jit
def place_of(BLOCKS, heads, CAUSAL: tl.constexpr):
    """Block, head and row (stream and image) of a program; under a causal mask the longest loops start first."""
    block, rest = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    if CAUSAL:
        block = BLOCKS - 1 - block
    return block, rest % heads, (rest // heads).to(tl.int64)
