"""Triton: what the attention kernels share: what a program reads, its tiles, and what of the scores is hidden.

A *strided tensor* is a pair, as the launchers hand it over: its pointer, and the strides of all axes but the channels.
A *matrix* is such a tensor's part for one row (stream and image) and one head, again a pair: where its first token
starts, and how far apart its tokens lie. The channels lie side by side in both.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# of a problem, not of a model: no number of them gets a kernel of its own. The numbers of queries and keys get another
# where 16 divides them: a mask then has the same bit for 16 neighbours, which are loaded together.
SIZES = ["images", "task_keys"]


@triton.jit
def query_program(shared, task, mask, images, heads, groups, queries, CAUSAL: tl.constexpr, BM: tl.constexpr):
    """What a program of BM queries computes, and what it reads for that.

    Args:
        shared: query, key and value, strided.
        task: task key and task value, strided.
        mask: strided.

    Returns: its block, head and row; its queries [BM]; the matrix of the queries; the matrices of the keys, shared and
    task, and of their values; the mask of its head.
    """
    block, head, row = program_of(tl.cdiv(queries, BM), heads, CAUSAL)
    stream, image, key_head = row // images, row % images, head // groups
    query, key, value = shared
    task_key, task_value = task
    keys_of = matrix_of(key, row, key_head), matrix_of(task_key, stream, key_head)
    values_of = matrix_of(value, row, key_head), matrix_of(task_value, stream, key_head)
    m = block * BM + tl.arange(0, BM)  # [BM]
    return block, head, row, m, matrix_of(query, row, head), keys_of, values_of, mask_of(mask, stream, image, head)


@triton.jit
def program_of(blocks, heads, CAUSAL: tl.constexpr):
    """Block, head and row (stream and image) of a program; under a causal mask the longest loops start first."""
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if CAUSAL:
        block = blocks - 1 - block
    return block, rest % heads, (rest // heads).to(tl.int64)


@triton.jit
def matrix_of(tensor, row, head, UNIT: tl.constexpr = 8):
    """The matrix of a row and a head; of a task tensor, of a stream and a head. The strides are multiples of UNIT.

    The compiler is told only of strides that divide by 16. Knowing the 8, it moves 16 bytes at a time with 72 channels
    too.
    """
    pointer, strides = tensor
    start = pointer + row * _multiple(strides[0], UNIT) + head * _multiple(strides[1], UNIT)
    return start, _multiple(strides[2], UNIT)


@triton.jit
def _multiple(stride, UNIT: tl.constexpr):
    return tl.cast(stride, tl.int64) // UNIT * UNIT


@triton.jit
def mask_of(mask, stream, image, head):
    """The mask of a head: where it starts, and its strides of query and key."""
    pointer, strides = mask
    start = pointer + stream * strides[0] + tl.cast(image, tl.int64) * strides[1]
    return start + tl.cast(head, tl.int64) * strides[2], strides[3], strides[4]


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
def load_keys(matrices, n, keys, end, D: tl.constexpr, BD: tl.constexpr, PART: tl.constexpr, JOINED: tl.constexpr):
    """Rows n of [shared ; task], of which the first ``keys`` are shared: [BN, BD], zeros from ``end`` on.

    Parts 0 and 1 are of shared keys only; part 2 is of task keys only, unless the last shared keys join them.
    """
    shared, task = matrices
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
def hide(b_s, scale, mask, row, column, rows, columns, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Hide what is not visible. Scores as the product left them, or, with an additive mask, times ``scale``.

    row and column: of the scores, shaped to broadcast to them either way round.
    """
    if MASK != "":
        start, stride_query, stride_key = mask
        pointer = start + row.to(tl.int64) * stride_query + column.to(tl.int64) * stride_key
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
def store_statistics(statistics, m, queries, row_max, row_sum, EXACT: tl.constexpr):
    """What finds the probabilities of queries m again: the lse in units of log 2, +inf where no key is seen.

    If EXACT, the row_max and the inverse of the row_sum stay apart, in two rows: their lse would round.
    """
    if EXACT:
        tl.store(statistics + m, tl.where(row_sum == 0.0, float("inf"), row_max), m < queries)
        tl.store(statistics + queries + m, 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum), m < queries)
    else:
        tl.store(statistics + m, tl.where(row_sum == 0.0, float("inf"), row_max + tl.log2(row_sum)), m < queries)


@triton.jit
def load_statistics(statistics, m, queries, EXACT: tl.constexpr):
    """What ``probabilities`` needs of queries m: the lse, or, if EXACT, the row_max, and the inverse of the row_sum."""
    shift = tl.load(statistics + m, m < queries, float("inf"))
    if EXACT:
        return shift, tl.load(statistics + queries + m, m < queries, 1.0)
    return shift, shift


@triton.jit
def probabilities(b_s, shift, inverse_sum, EXACT: tl.constexpr):
    """Of scores in units of log 2; what ``load_statistics`` returns is shaped to broadcast to them either way round."""
    b_p = tl.exp2(b_s - shift)
    if EXACT:
        b_p *= inverse_sum
    return b_p


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
