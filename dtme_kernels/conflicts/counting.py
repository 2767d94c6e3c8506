"""Triton: from the dots of pieces to signs and counts, and to the list of those whose sign is not known yet."""

import triton
import triton.language as tl

from .rotation import decoded, tasks_of


@triton.jit
def _add(counts, i, j, tasks, mask):
    """To both halves. Of integers the order of additions does not show."""
    number = tl.sum(mask.to(tl.int32)).to(tl.int64)
    if number > 0:
        tl.atomic_add(counts + i * tasks + j, number, sem="relaxed")
        tl.atomic_add(counts + j * tasks + i, number, sem="relaxed")


@triton.jit
def _sum_of_pieces(pointer, stride, first, end, inside, BT: tl.constexpr):
    b_sum = tl.zeros([BT], tl.float32)
    for piece in range(first, end):
        b_sum += tl.load(pointer + piece * stride, inside, 0.0)
    return b_sum


@triton.jit
def _segments(pointer, stride, starts, skipped, whole, settling, inside, BT: tl.constexpr):
    """The dots of all segments, [BT] each: the skipped one's 0; and when ``settling``, what was found since.

    ``whole``: whether that is in all of its pieces, or in the first of them.
    """
    b_known, b_all = (), ()
    for s in tl.static_range(len(starts) - 1):
        first, next_ = decoded(starts[s]), decoded(starts[s + 1])
        end = tl.where(skipped == s, first, next_)
        b_known += (_sum_of_pieces(pointer, stride, first, end, inside, BT),)
        end = tl.where((skipped == s) & (settling != 0), tl.where(whole, next_, first + 1), first)
        b_all += (b_known[s] + _sum_of_pieces(pointer, stride, first, end, inside, BT),)
    return b_known, b_all


@triton.jit
def _sides(b_segments, r: tl.constexpr, BT: tl.constexpr):
    """The dots below and above the r-th rank, of the segments' dots."""
    b_range, b_null = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    for s in tl.static_range(len(b_segments)):
        if s <= r:
            b_range += b_segments[s]
        else:
            b_null += b_segments[s]
    return b_range, b_null


@triton.jit
def _any_doubt(b_known, b_total, b_doubt, skipped, BT: tl.constexpr):
    """Whether the total less all known dots of one side is, for any rank, too small for its sign to be known."""
    # a NaN or Inf in a gradient has reached the total; one in the basis the doubt, and nothing is above that
    doubtful = b_doubt != b_doubt
    for r in tl.static_range(len(b_known) - 1):
        b_range, b_null = _sides(b_known, r, BT)
        doubtful |= tl.abs(b_total - tl.where(skipped <= r, b_null, b_range)) <= b_doubt
    return doubtful & (tl.abs(b_total) < float("inf"))


@triton.jit
def _list(items, undecided, mask, pair, row, rows, limit):
    """Append the (pair, row)s, as many as there is room for; ``undecided`` counts all."""
    number = tl.sum(mask.to(tl.int32))
    if number > 0:
        index = tl.atomic_add(undecided, number, sem="relaxed") + tl.cumsum(mask.to(tl.int32)) - 1
        tl.store(items + index, pair * rows + row, mask & (index < limit))


@triton.jit(do_not_specialize=["tasks", "rows", "stop", "skipped", "limit", "settling"])
def count(
    dots,
    scales,
    norms,
    totals,
    doubt,
    counts,
    undecided,
    items,
    tasks,
    rows,
    stop,
    starts,
    skipped,
    limit,
    settling,
    COUNT_ZERO: tl.constexpr,
    BT: tl.constexpr,
):
    """Add what one tile of rows has of one pair to ``counts``: range and null (R, K, K), valid (K, K), nonfinite ().

    ``starts``: the first pieces of the R + 1 segments, and the number of pieces. The skipped segment's dot is the total
    less all others. Where that makes a side of a rank no larger than ``doubt`` times both norms, its sign is not known:
    the (pair, row) is listed. It is counted when ``settling``, by the dot that was found since: in all pieces of the
    segment where there are more ``undecided`` than ``limit``, else in the first of them.
    """
    range_, null, valid, nonfinite = counts
    pair = tl.program_id(1)
    i, j = tasks_of(pair, tasks)
    number = tl.load(undecided)
    stop = tl.where((settling != 0) & (number == 0), 0, stop)  # then all is counted
    row = tl.program_id(0) * BT + tl.arange(0, BT)  # [BT]
    inside = row < stop
    row_i, row_j = i * rows + row, j * rows + row
    nonzero = (tl.load(scales + row_i, inside, 0.0) != 0) & (tl.load(scales + row_j, inside, 0.0) != 0)
    stride = tl.cast(rows, tl.int64) * (tasks * (tasks - 1) // 2)
    pointer = dots + pair.to(tl.int64) * rows + row
    b_known, b_all = _segments(pointer, stride, starts, skipped, number > limit, settling, inside, BT)
    derived = row < tl.where(skipped >= 0, stop, 0)
    b_total = tl.load(totals + pair.to(tl.int64) * rows + row, derived, 0.0)
    b_doubt = tl.load(norms + row_i, derived, 0.0) * tl.load(norms + row_j, derived, 0.0) * tl.load(doubt)
    doubtful = derived & nonzero & _any_doubt(b_known, b_total, b_doubt, skipped, BT)
    if settling == 0:
        _list(items, undecided, doubtful, pair, row, rows, limit)
    seen = inside & (doubtful == (settling != 0))
    derived &= doubtful == 0
    for r in tl.static_range(len(starts) - 2):
        b_range, b_null = _sides(b_all, r, BT)
        b_range = tl.where(derived & (skipped <= r), b_total - b_null, b_range)
        b_null = tl.where(derived & (skipped > r), b_total - b_range, b_null)
        finite = (tl.abs(b_range) < float("inf")) & (tl.abs(b_null) < float("inf"))
        usable = seen & finite
        if not COUNT_ZERO:
            usable &= nonzero
        _add(range_ + r * tasks * tasks, i, j, tasks, usable & (b_range <= 0))
        _add(null + r * tasks * tasks, i, j, tasks, usable & (b_null <= 0))
        if r == 0:
            _add(valid, i, j, tasks, usable)
            left_out = tl.sum((seen & (finite == 0)).to(tl.int32)).to(tl.int64)
            if left_out > 0:
                tl.atomic_add(nonfinite, left_out, sem="relaxed")
