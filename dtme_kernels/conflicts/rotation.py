"""Triton: rotate gradients into blocks of eigenvectors, and take their pairwise dots before any leaves the chip."""

from collections.abc import Sequence

import triton
import triton.language as tl

from . import tiles

MAX_TASKS: tl.constexpr = tl.constexpr(tiles.MAX_TASKS)
# of a batch or of an analysis, not of a model: no value of them gets a kernel of its own
SIZES = [
    "rows",
    "tasks",
    "begin",
    "hole_at",
    "hole",
    "limit",
    "first_block",
    "end_block",
    "low",
    "high",
    "piece",
]


def encode(numbers: Sequence[int]) -> tuple[int, ...]:
    """As kernels take a tuple of them. Triton would compile 1 and the multiples of 16 for themselves: here are none."""
    return tuple(16 * n + 8 for n in numbers)


@triton.jit
def encoded(n):
    return 16 * n + 8


@triton.jit
def decoded(n):
    return n // 16


@triton.jit
def _piece(block, index, ranks, BN: tl.constexpr):
    """The first and last + 1 coordinate of a block's index-th piece, encoded, and its number among all pieces."""
    low, high, number = encoded(block * BN), encoded(block * BN + BN), block + index
    taken = 0
    first, last = low, high
    for r in tl.static_range(len(ranks)):
        within = (ranks[r] > low) & (ranks[r] < high)
        first = tl.where(within & (taken < index), ranks[r], first)
        last = tl.where(within & (taken == index), ranks[r], last)
        taken += within.to(tl.int32)
        number += ((ranks[r] < low) & (decoded(ranks[r]) % BN > 0)).to(tl.int32)
    return first, last, number


@triton.jit
def _pieces(block, ranks, BN: tl.constexpr):
    """How many pieces a block has."""
    count = 1
    for r in tl.static_range(len(ranks)):
        count += ((ranks[r] > encoded(block * BN)) & (ranks[r] < encoded(block * BN + BN))).to(tl.int32)
    return count


@triton.jit
def _rotate(
    terms,
    terms_apart,
    basis,
    height,
    columns,
    column,
    starts,
    GRAD_TERMS: tl.constexpr,
    BASIS_TERMS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Tiles [BT, BN] of h = U^T g, in scaled units, of the rows of terms that begin at ``starts`` [BT], a tile each."""
    b_h = ()
    for _ in tl.static_range(len(starts)):
        b_h += (tl.zeros([BT, BN], tl.float32),)
    for first in range(0, height, BK):
        channel = first + tl.arange(0, BK)  # [BK]
        pointer = basis + channel[:, None] * columns + column[None, :]
        b_u = tl.load(pointer)  # [BK, BN]
        if BASIS_TERMS == 2:
            b_u_low = tl.load(pointer + height * columns)
        b_next = ()
        for i in tl.static_range(len(starts)):
            b_g = tl.load(terms + starts[i][:, None] + channel[None, :])  # [BT, BK]
            # tensor cores round towards zero whenever they add: their sums are short, and added with rounding
            b_sum = b_h[i]
            if BASIS_TERMS == 2:
                b_sum += tl.dot(b_g, b_u_low)
            if GRAD_TERMS == 2:
                b_g_low = tl.load(terms + terms_apart + starts[i][:, None] + channel[None, :])
                b_sum += tl.dot(b_g_low, b_u)
            b_next += (b_sum + tl.dot(b_g, b_u),)
        b_h = b_next
    return b_h


@triton.jit(do_not_specialize=SIZES)
def pair_dots(
    terms,
    basis,
    units,
    dots,
    undecided,
    rows,
    height,
    columns,
    ranks,
    begin,
    hole_at,
    hole,
    limit,
    K: tl.constexpr,
    G: tl.constexpr,
    GRAD_TERMS: tl.constexpr,
    BASIS_TERMS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dots[piece, pair, row] = sum of h_i h_j over the pieces of a block, in the rows' scales.

    Blocks from ``begin`` on, and from ``hole_at`` on those that are ``hole`` further. With a limit >= 0, nothing is
    done unless ``undecided`` is above it. G tasks share a loop over the channels: their sums are in registers together.
    """
    wanted = limit < 0
    if limit >= 0:
        wanted = tl.load(undecided) > limit
    if wanted:
        block = begin + tl.program_id(0)  # of one tile of rows all blocks side by side: it comes to the cache once
        block += tl.where(block >= hole_at, hole, 0)
        row = tl.program_id(1) * BT + tl.arange(0, BT)  # [BT]
        column = block * BN + tl.arange(0, BN)  # [BN]
        terms_apart = tl.cast(rows, tl.int64) * height * K
        unit = tl.load(units + column)  # [BN]
        b_h = ()
        for group in tl.static_range(0, K, G):
            starts = ()
            for task in tl.static_range(group, min(group + G, K)):
                starts += ((tl.cast(rows, tl.int64) * task + row) * height,)
            b_h += _rotate(
                terms, terms_apart, basis, height, columns, column, starts, GRAD_TERMS, BASIS_TERMS, BT, BN, BK
            )
        for index in range(_pieces(block, ranks, BN)):
            first, last, piece = _piece(block, index, ranks, BN)
            inside = (encoded(column) >= first) & (encoded(column) < last)
            weight = tl.where(inside, unit * unit, 0.0)[None, :]  # undoes the scales of both sides
            pointer = dots + piece.to(tl.int64) * (K * (K - 1) // 2) * rows + row
            # a loop over i, lest the products of all pairs wait in registers at once, and take minutes to compile
            for i in range(K - 1):
                b_h_i = b_h[0]  # type: ignore[misc]
                for k in tl.static_range(1, K):
                    b_h_i = tl.where(i == k, b_h[k], b_h_i)
                b_h_i *= weight
                for j in tl.static_range(1, K):
                    if j > i:
                        tl.store(pointer + (j - i - 1) * rows, tl.sum(b_h_i * b_h[j], 1))
                pointer += (K - 1 - i) * rows


@triton.jit
def tasks_of(pair, tasks):
    """i < j of a pair's index in itertools.combinations(range(tasks), 2)."""
    i = pair * 0
    for k in tl.static_range(1, MAX_TASKS - 1):
        i += ((k < tasks - 1) & (pair >= k * (2 * tasks - k - 1) // 2)).to(tl.int32)
    return i, pair - i * (2 * tasks - i - 1) // 2 + i + 1


@triton.jit(do_not_specialize=SIZES)
def settle(
    terms,
    basis,
    units,
    dots,
    undecided,
    items,
    tasks,
    rows,
    height,
    columns,
    first_block,
    end_block,
    low,
    high,
    piece,
    limit,
    GRAD_TERMS: tl.constexpr,
    BASIS_TERMS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Rotate listed (pair, row)s into the coordinates from ``low`` to ``high``: dots[piece, pair, row] is their dot.

    A fixed number of programs share the list; nothing is done where it has more than ``limit`` items.
    """
    number = tl.load(undecided)
    terms_apart = tl.cast(rows, tl.int64) * height * tasks
    number = tl.where(number > limit, 0, number)
    for begin in range(tl.program_id(0) * BT, number, tl.num_programs(0) * BT):
        index = begin + tl.arange(0, BT)
        item = tl.load(items + index, index < number, 0)  # [BT]
        pair, row = item // rows, item % rows
        i, j = tasks_of(pair, tasks)
        starts = (i.to(tl.int64) * rows + row) * height, (j.to(tl.int64) * rows + row) * height
        b_dot = tl.zeros([BT], tl.float32)
        for block in range(first_block, end_block):
            column = block * BN + tl.arange(0, BN)  # [BN]
            unit = tl.load(units + column)  # [BN]
            b_h = _rotate(
                terms, terms_apart, basis, height, columns, column, starts, GRAD_TERMS, BASIS_TERMS, BT, BN, BK
            )
            weight = tl.where((column >= low) & (column < high), unit * unit, 0.0)[None, :]
            b_dot += tl.sum(b_h[0] * weight * b_h[1], 1)
        pointer = dots + (tl.cast(piece, tl.int64) * (tasks * (tasks - 1) // 2) + pair) * rows + row
        tl.store(pointer, b_dot, index < number)
