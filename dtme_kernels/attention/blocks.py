"""Triton: what the attention kernels share: a program's place, its tiles, and what of the scores is hidden.

A *matrix* is a pair: where its first row starts, and how far apart its rows lie. Its channels lie side by side.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# of a problem, not of a model: no number of them gets a kernel of its own. The numbers of queries and keys get another
# where 16 divides them: a mask then has the same bit for 16 neighbours, which are loaded together.
SIZES = ["images", "task_keys"]


@triton.jit
def matrix_of(tensor, strides, row, head, UNIT: tl.constexpr = 8):
    """The matrix of a row (stream and image) and a head. ``strides``: of row, head and token, multiples of UNIT.

    The compiler is told only of strides that divide by 16. Knowing the 8, it moves 16 bytes at a time with 72 channels
    too.
    """
    start = tensor + row * _multiple(strides[0], UNIT) + head * _multiple(strides[1], UNIT)
    return start, _multiple(strides[2], UNIT)


@triton.jit
def _multiple(stride, UNIT: tl.constexpr):
    return tl.cast(stride, tl.int64) // UNIT * UNIT


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
def statistics_of(statistics, vector, queries, EXACT: tl.constexpr):
    """Where those of a head begin. ``vector``: the head's number among all heads of all rows."""
    return statistics + vector * queries * (2 if EXACT else 1)


@triton.jit
def store_statistics(statistics, m, queries, b_most, b_sum, EXACT: tl.constexpr):
    """What finds the probabilities of queries m again: a log-sum-exp in units of log 2, +inf where no key is seen.

    If EXACT, the greatest score and the inverse of the sum stay apart, in two rows: their log-sum-exp would round.
    """
    if EXACT:
        tl.store(statistics + m, tl.where(b_sum == 0.0, float("inf"), b_most), m < queries)
        tl.store(statistics + queries + m, 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum), m < queries)
    else:
        tl.store(statistics + m, tl.where(b_sum == 0.0, float("inf"), b_most + tl.log2(b_sum)), m < queries)


@triton.jit
def load_statistics(statistics, m, queries, EXACT: tl.constexpr):
    """What to subtract from a score, and, if EXACT, what to multiply its exponential by, to have a probability."""
    b_at = tl.load(statistics + m, m < queries, float("inf"))
    if EXACT:
        return b_at, tl.load(statistics + queries + m, m < queries, 1.0)
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
