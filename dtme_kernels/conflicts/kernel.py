"""Triton: rotate all tasks' gradients at once and take their pairwise dots before anything leaves the chip.

The fewest bytes are one read of the gradients, ``K M p`` numbers; the fewest operations one product with the basis,
``2 K M p^2``, and ``2 P M p`` for the dots. A program rotates one tile of tokens of all K tasks into a few eigenvectors'
coordinates, which stay in registers, so that only the P dots of every token leave it: ``P`` numbers a segment of
eigenvectors, some hundredths of the gradients. The segments give a GPU enough programs, and a rank is a border between
two of them: any number of ranks costs one rotation. A second kernel adds the segments on either side of the border, looks
at the signs and counts. Design considered instead: the library's product in chunks that stay in the L2 cache, then the
counting. It moves ``K M p`` float32 numbers through that cache twice and needs them as memory.

Signs in the null space hang on the last bits of large numbers that cancel (method.md, section 2), so nothing is rounded
to the gradients' precision. Tensor cores multiply 11-bit numbers exactly: a float32 number is the sum of two float16
numbers to 22 bits, if its size suits their range, and a power of two per token and per eigenvector sees to that. A
bfloat16 or float16 gradient is one such number already. So a rotation is 1, 2 or 3 products (``_Plan``).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import collapse, limits, on_device
from .scaling import inverse, load_scale, scale_tokens, split_basis, token_offset


@triton.jit
def _segment(index, ranks, p, width):
    """First and last + 1 coordinate of a segment: at most ``width`` of them, on one side of every rank."""
    first, last, segments, low = 0, 0, 0, 0
    for r in tl.static_range(len(ranks) + 1):
        high = p
        if r < len(ranks):
            high = ranks[r]
        own = index - segments
        count = tl.cdiv(high - low, width)
        within = (own >= 0) & (own < count)
        first = tl.where(within, low + own * width, first)
        last = tl.where(within, tl.minimum(low + own * width + width, high), last)
        segments += count
        low = high
    return first, last


@triton.jit
def _segments_below(R: tl.constexpr, ranks, p, width):
    """How many segments lie below ranks[R]; below p, all of them, where R is the number of ranks."""
    segments, low = 0, 0
    for r in tl.static_range(R + 1):
        high = p
        if r < len(ranks):
            high = ranks[r]
        segments += tl.cdiv(high - low, width)
        low = high
    return segments


@triton.jit
def _rotate(
    grads,
    scales,
    basis,
    units,
    sizes,
    p,
    strides,
    basis_strides,
    token,
    first,
    last,
    K: tl.constexpr,
    PASSES: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """K tiles [BT, BN] of h = U^T g, coordinates first <= c < last and 0 beyond, each token in its own scale.

    PASSES: 0, gradients and basis are multiplied as they are. 1, in 11 bits each. 2, an 11-bit gradient with a 22-bit
    basis. 3, 22 bits each.
    """
    inside = token < sizes[0]
    start = grads + token_offset(token, sizes, strides)  # [BT]
    column = first + tl.arange(0, BN)  # [BN]
    b_h = ()
    b_scale = ()
    for task in tl.static_range(K):
        b_h += (tl.zeros([BT, BN], tl.float32),)
        b_scale += (load_scale(scales, task, token, sizes)[:, None],)
    for begin in range(0, p, BK):
        channel = begin + tl.arange(0, BK)  # [BK]
        within = (channel < p)[:, None] & (column < last)[None, :]
        place = basis + channel[:, None] * basis_strides[0] + column[None, :] * basis_strides[1]
        b_u = tl.load(place, within, 0.0)  # [BK, BN]
        if PASSES >= 2:
            b_u_low = tl.load(place + p * p, within, 0.0)
        mask = inside[:, None] & (channel < p)[None, :]
        b_next = ()
        for task in tl.static_range(K):
            offset = tl.cast(strides[0], tl.int64) * task + channel * strides[3]
            b_g = tl.load(start[:, None] + offset[None, :], mask, 0.0)  # [BT, BK]
            if PASSES == 0:
                b_next += (tl.dot(b_g, b_u, b_h[task]),)
            else:
                b_g = b_g.to(tl.float32) * b_scale[task]
                b_high = b_g.to(tl.float16)
                if PASSES == 1:
                    b_next += (tl.dot(b_high, b_u, b_h[task]),)
                else:
                    # small terms first, and one rounded addition to the sum: a tensor core's own round towards zero
                    b_part = tl.dot(b_high, b_u_low)
                    if PASSES == 3:
                        b_part = tl.dot((b_g - b_high.to(tl.float32)).to(tl.float16), b_u, b_part)
                    b_next += (b_h[task] + tl.dot(b_high, b_u, b_part),)
        b_h = b_next
    b_rotated = ()
    for task in tl.static_range(K):
        if PASSES == 0:
            b_rotated += (b_h[task] * b_scale[task],)
        else:
            b_rotated += (b_h[task] * tl.load(units + column, column < p, 0.0)[None, :],)
    return b_rotated


@triton.jit(do_not_specialize=["sizes", "ranks", "width"])
def _pair_dots(
    grads,
    scales,
    basis,
    units,
    dots,
    sizes,
    p,
    strides,
    basis_strides,
    ranks,
    width,
    K: tl.constexpr,
    PASSES: tl.constexpr,
    UNSCALE: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dots[segment, pair, token] = sum of h_i h_j over the segment's coordinates, in the tokens' scales or without."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    num_tokens = tl.cast(sizes[0], tl.int64)
    segment = tl.program_id(1)
    first, last = _segment(segment, ranks, p, width)
    for begin in range(first, last, BN):
        b_h = _rotate(
            grads, scales, basis, units, sizes, p, strides, basis_strides, token, begin, last, K, PASSES, BT, BN, BK
        )
        place = dots + segment * (K * (K - 1) // 2) * num_tokens + token
        again = token < tl.where(begin > first, num_tokens, 0)
        for i in tl.static_range(K):
            for j in tl.static_range(i + 1, K):
                b_dot = tl.sum(b_h[i] * b_h[j], 1)  # [BT]
                if UNSCALE:
                    one, other = (
                        inverse(load_scale(scales, i, token, sizes)),
                        inverse(load_scale(scales, j, token, sizes)),
                    )
                    b_dot = b_dot * tl.minimum(one, other) * tl.maximum(one, other)  # no overflow on the way
                tl.store(place, b_dot + tl.load(place, again, 0.0), token < num_tokens)
                place += num_tokens
        tl.debug_barrier()  # the next round reads what other threads have stored


@triton.jit(do_not_specialize=["sizes", "ranks", "width"])
def _count(
    dots,
    scales,
    range_,
    null,
    valid,
    nonfinite,
    sizes,
    p,
    ranks,
    width,
    K: tl.constexpr,
    COUNT_ZERO: tl.constexpr,
    BT: tl.constexpr,
):
    """Add what one tile of tokens has of one pair to range_ and null (R, K, K), valid (K, K) and nonfinite."""
    i, j = tl.program_id(1) // K, tl.program_id(1) % K
    if i < j:
        num_tokens = tl.cast(sizes[0], tl.int64)
        token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
        inside = token < num_tokens
        compared = inside
        if not COUNT_ZERO:
            compared = (load_scale(scales, i, token, sizes) != 0) & (load_scale(scales, j, token, sizes) != 0)
        place = dots + (i * (2 * K - i - 1) // 2 + j - i - 1) * num_tokens + token
        stride_segment = num_tokens * (K * (K - 1) // 2)
        segments = _segments_below(len(ranks), ranks, p, width)
        for r in tl.static_range(len(ranks)):
            border = _segments_below(r, ranks, p, width)
            b_range = tl.zeros([BT], tl.float32)
            for segment in range(0, border):
                b_range += tl.load(place + segment * stride_segment, inside, 0.0)
            b_null = tl.zeros([BT], tl.float32)
            for segment in range(border, segments):
                b_null += tl.load(place + segment * stride_segment, inside, 0.0)
            # a NaN or Inf in a gradient or in the basis has reached one of the dots
            finite = (tl.abs(b_range) < float("inf")) & (tl.abs(b_null) < float("inf"))
            usable = compared & finite
            _add(range_ + r * K * K, i, j, K, (b_range <= 0) & usable)
            _add(null + r * K * K, i, j, K, (b_null <= 0) & usable)
            if r == 0:
                _add(valid, i, j, K, usable)
                tl.atomic_add(nonfinite, _number(inside & (finite == 0)), sem="relaxed")


@triton.jit
def _number(mask):
    return tl.sum(mask.to(tl.int32)).to(tl.int64)


@triton.jit
def _add(counts, i, j, K: tl.constexpr, mask):
    """To both halves. Of integers the order of additions does not show."""
    number = _number(mask)
    tl.atomic_add(counts + i * K + j, number, sem="relaxed")
    tl.atomic_add(counts + j * K + i, number, sem="relaxed")


@triton.jit(do_not_specialize=["sizes", "ranks", "width"])
def _mix(
    grads,
    scales,
    basis,
    units,
    weights,
    out,
    sizes,
    p,
    strides,
    basis_strides,
    ranks,
    width,
    K: tl.constexpr,
    PASSES: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[i, token] = sum over j of weights[space, pair(i, j), token] h_j[token]: the gradient at h, one segment."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    num_tokens = tl.cast(sizes[0], tl.int64)
    first, last = _segment(tl.program_id(1), ranks, p, width)
    b_h = _rotate(
        grads, scales, basis, units, sizes, p, strides, basis_strides, token, first, last, K, PASSES, BT, BN, BK
    )
    b_true = ()
    for task in tl.static_range(K):
        b_true += (b_h[task] * inverse(load_scale(scales, task, token, sizes))[:, None],)
    column = first + tl.arange(0, BN)  # [BN]
    inside = token < num_tokens
    mask = inside[:, None] & (column < last)[None, :]
    start = weights + tl.where(first < ranks[0], 0, num_tokens * (K * (K - 1) // 2)) + token
    for i in tl.static_range(K):
        b_out = tl.zeros([BT, BN], tl.float32)
        for j in tl.static_range(K):
            if i < j:
                b_out += tl.load(start + _pair(i, j, K) * num_tokens, inside, 0.0)[:, None] * b_true[j]
            if i > j:
                b_out += tl.load(start + _pair(j, i, K) * num_tokens, inside, 0.0)[:, None] * b_true[j]
        tl.store(out + (i * num_tokens + token)[:, None] * p + column[None, :], b_out, mask)


@triton.jit
def _pair(i, j, K: tl.constexpr):
    """The place of i < j in itertools.combinations(range(K), 2)."""
    return i * (2 * K - i - 1) // 2 + j - i - 1


class _Rotation:
    """Tiles, launch options and scaled operands of a rotation: what ``_pair_dots`` and ``_mix`` share."""

    def __init__(self, grads: Tensor, basis: Tensor) -> None:
        self.grads = collapse(grads, keep=1)
        self.num_tasks, outer, inner, self.p = self.grads.shape
        self.num_pairs = self.num_tasks * (self.num_tasks - 1) // 2
        self.num_tokens = outer * inner
        self.sizes = self.num_tokens, inner
        self.passes = _passes(grads.dtype, basis.dtype)
        self.tile, self.options = _tile(self.num_tasks, grads.dtype, self.passes, grads.device)
        self.scales = grads.new_empty((self.num_tasks, self.num_tokens), dtype=torch.float32)
        grid = (triton.cdiv(self.num_tokens, 8), self.num_tasks)
        block = min(1024, triton.next_power_of_2(self.p))
        scale_tokens[grid](self.grads, self.scales, self.sizes, self.p, self.grads.stride(), BT=8, BC=block)
        self.basis, self.units = basis, self.scales  # units belong to a split basis
        if self.passes:
            self.basis = basis.new_empty((2, self.p, self.p), dtype=torch.float16)
            self.units = basis.new_empty(self.p, dtype=torch.float32)
            grid = (triton.cdiv(self.p, 16),)
            split_basis[grid](basis, self.basis, self.units, self.p, basis.stride(), BC=64, BN=16)

    def segments(self, ranks: Sequence[int], width: int) -> int:
        borders = [0, *ranks, self.p]
        return sum(triton.cdiv(high - low, width) for low, high in zip(borders, borders[1:], strict=False))

    def launch(self, kernel: Any, pointers: tuple[Tensor, ...], ranks: Sequence[int], width: int, **flags: bool) -> None:
        kernel[(triton.cdiv(self.num_tokens, self.tile["BT"]), self.segments(ranks, width))](
            *(self.grads, self.scales, self.basis, self.units, *pointers),
            *(self.sizes, self.p, self.grads.stride(), self.basis.stride()[-2:], tuple(ranks), width),
            K=self.num_tasks,
            PASSES=self.passes,
            **flags,
            **self.tile,
            **self.options,
        )

    def pair_dots(self, ranks: Sequence[int], unscale: bool) -> tuple[Tensor, int]:
        """(segments, P, tokens) float32, and how many coordinates a segment has: about four rounds of programs."""
        width = self.tile["BN"]
        programs = triton.cdiv(self.num_tokens, self.tile["BT"]) * self.segments(ranks, width)
        width *= max(1, programs // (4 * limits(self.grads.device).multiprocessors))
        dots = self.scales.new_empty(self.segments(ranks, width), self.num_pairs, self.num_tokens)
        self.launch(_pair_dots, (dots,), ranks, width, UNSCALE=unscale)
        return dots, width


def _passes(grads: torch.dtype, basis: torch.dtype) -> int:
    """As few products as are exact; for float32 gradients, as exact as ``torch.get_float32_matmul_precision()`` says."""
    if grads == torch.float32:
        return 3 if torch.get_float32_matmul_precision() == "highest" else 1
    return 0 if grads == basis else 2


def _tile(num_tasks: int, dtype: torch.dtype, passes: int, device: torch.device) -> tuple[dict[str, int], ...]:
    """The largest tile whose K accumulators fit the registers, and as many stages of it as fit the shared memory."""
    coordinates = 128 if num_tasks <= 5 else 64 if num_tasks <= 8 else 32
    channels = 32 if dtype == torch.float32 else 64
    stage = 64 * channels * num_tasks * dtype.itemsize + channels * coordinates * 2 * min(2, max(1, passes))
    stages = (limits(device).shared_memory - 8192) // stage
    return {"BT": 64, "BN": coordinates, "BK": channels}, {"num_warps": 8, "num_stages": min(4, max(1, stages))}


def count_conflicts(
    grads: Tensor, basis: Tensor, ranks: Sequence[int], count_zero_gradients: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(K, ..., p), (p, p), R increasing ranks -> range and null (R, K, K), valid (K, K), nonfinite (), all int64."""
    num_tasks = len(grads)
    shapes = (len(ranks), num_tasks, num_tasks), (len(ranks), num_tasks, num_tasks), (num_tasks, num_tasks), ()
    counts = tuple(torch.zeros(shape, dtype=torch.int64, device=grads.device) for shape in shapes)
    if grads.numel():
        with on_device(grads):
            rotation = _Rotation(grads, basis)
            dots, width = rotation.pair_dots(ranks, unscale=False)
            _count[(triton.cdiv(rotation.num_tokens, 1024), num_tasks**2)](
                *(dots, rotation.scales, *counts, rotation.sizes, rotation.p, tuple(ranks), width),
                K=num_tasks,
                COUNT_ZERO=count_zero_gradients,
                BT=1024,
            )
    return counts  # type: ignore[return-value]


def projected_dots(grads: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(K, ..., p), (p, p) -> range and null dots, (P, ...) float32."""
    num_tasks, *lead, _ = grads.shape
    shape = (num_tasks * (num_tasks - 1) // 2, *lead)
    if not grads.numel():
        return grads.new_empty(shape, dtype=torch.float32), grads.new_empty(shape, dtype=torch.float32)
    with on_device(grads):
        rotation = _Rotation(grads, basis)
        dots, width = rotation.pair_dots([rank], unscale=True)
        border = triton.cdiv(rank, width)
        return dots[:border].sum(0).view(shape), dots[border:].sum(0).view(shape)


def projected_dots_backward(
    grad_range: Tensor, grad_null: Tensor, grads: Tensor, basis: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """dh_i = sum_j w_ij h_j on chip, then dg = U dh and dU = g dh^T by the library: each is one large product."""
    dh = grads.new_empty(grads.shape, dtype=torch.float32)
    if grads.numel():
        with on_device(grads):
            rotation = _Rotation(grads, basis)
            weights = torch.stack([grad_range, grad_null]).view(2, rotation.num_pairs, rotation.num_tokens)
            rotation.launch(_mix, (weights, dh), [rank], rotation.tile["BN"])
    u, rows = basis.float(), dh.view(-1, dh.shape[-1])
    d_basis = grads.reshape(rows.shape).float().mT @ rows
    return (dh @ u.mT).to(grads.dtype), d_basis.to(basis.dtype)
