"""Triton: rotate the gradients of all tasks and take their pairwise dots before anything leaves the chip.

The fewest bytes are one read of the gradients, ``K M p`` numbers; the fewest operations one product with the basis,
``2 K M p^2``, and ``2 P M p`` for the dots. A program rotates a tile of tokens of all K tasks into one block of
eigenvectors. The coordinates stay in its registers, and what leaves it is P numbers a token and block. These blocks
give a GPU enough programs and even rounds of them, where a program a tile of tokens would leave a quarter of it idle at
6,144 tokens; a rank is a border between blocks, so that any number of ranks costs one rotation. A second kernel adds
the blocks on either side of the border, looks at the signs and counts, while those numbers are in the L2 cache: tokens
are taken in slabs of 16 MB of them.

The other design, the library's product into chunks that stay in the L2 cache and then the counting, moves ``K M p``
float32 numbers through that cache twice, and cannot have them in less memory than 5 % of bfloat16 gradients without
launches too small for the chip.

Signs in the null space hang on the last bits of large numbers that cancel (method.md, section 2), so nothing is rounded
to the gradients' precision. Tensor cores multiply 11-bit numbers exactly; ``scaling`` makes float32 numbers such. A
rotation is 1, 2 or 3 products (``_rotate``), and tensor cores add only short sums.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import collapse, highest, in_reach, on_device
from .scaling import load_scale, scale_tokens, split_basis, token_offset
from .tiles import tile

Slab = tuple[int, int]
SLAB = 2**24  # bytes of dots between two kernels: they fit the L2 cache


@triton.jit
def _segment(index, ranks, p, BN: tl.constexpr):
    """First and last + 1 coordinate of a segment: what one block of BN coordinates has between two ranks."""
    first, last, segments, low = 0, 0, 0, 0
    for r in tl.static_range(len(ranks) + 1):
        high = p
        if r < len(ranks):
            high = ranks[r]
        block = low // BN + index - segments
        within = (index >= segments) & (block * BN < high)
        first = tl.where(within, tl.maximum(low, block * BN), first)
        last = tl.where(within, tl.minimum(high, block * BN + BN), last)
        segments += tl.cdiv(high, BN) - low // BN
        low = high
    return first, last


@triton.jit
def _segments_below(R: tl.constexpr, ranks, p, BN: tl.constexpr):
    """How many segments lie below ranks[R]; below p, all of them, where R is the number of ranks."""
    segments, low = 0, 0
    for r in tl.static_range(R + 1):
        high = p
        if r < len(ranks):
            high = ranks[r]
        segments += tl.cdiv(high, BN) - low // BN
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
    rows,
    first,
    last,
    K: tl.constexpr,
    G: tl.constexpr,
    PASSES: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """K tiles [BT, BN] of h = U^T g: the block of coordinates that first is in, 0 outside first <= c < last; scaled.

    G tasks share a loop over the channels: the operands of as many are in registers. PASSES: 0, gradients and basis are
    multiplied as they are. 1, in 11 bits each. 2, an 11-bit gradient with a 22-bit basis. 3, 22 bits each.
    """
    inside = token < sizes[0]
    column = first // BN * BN + tl.arange(0, BN)  # [BN]: a block, for aligned loads whatever the rank
    if PASSES >= 1:
        unit = tl.load(units + column, column < p, 0.0)[None, :]
    b_h = ()
    for begin in tl.static_range(0, K, G):
        b_group = ()
        for _ in tl.static_range(begin, min(begin + G, K)):
            b_group += (tl.zeros([BT, BN], tl.float32),)
        for start in range(0, p, BK):
            channel = start + tl.arange(0, BK)  # [BK]
            within = (channel < p)[:, None] & (column < p)[None, :]
            place = basis + channel[:, None] * basis_strides[0] + column[None, :] * basis_strides[1]
            b_u = tl.load(place, within, 0.0)  # [BK, BN]
            if PASSES >= 2:
                b_u_low = tl.load(place + p * p, within, 0.0)
            mask = inside[:, None] & (channel < p)[None, :]
            b_next = ()
            for task in tl.static_range(begin, min(begin + G, K)):
                own = grads + tl.cast(strides[0], tl.int64) * task
                b_g = tl.load(own + rows[:, None] + channel[None, :] * strides[3], mask, 0.0)  # [BT, BK]
                if PASSES == 0:
                    b_sum = tl.dot(b_g, b_u, b_group[task - begin])
                else:
                    b_g = b_g.to(tl.float32) * load_scale(scales, task, token, sizes)[:, None]
                    b_high = b_g.to(tl.float16)
                    # tensor cores round towards zero whenever they add: their sums are short, and added with rounding
                    b_sum = b_group[task - begin] + tl.dot(b_high, b_u) * unit
                    if PASSES >= 2:
                        b_sum += tl.dot(b_high, b_u_low) * unit
                    if PASSES == 3:
                        b_sum += tl.dot((b_g - b_high.to(tl.float32)).to(tl.float16), b_u) * unit
                b_next += (b_sum,)
            b_group = b_next
        b_h += b_group
    own = ((column >= first) & (column < last))[None, :]
    b_rotated = ()
    for task in tl.static_range(K):
        b_own = tl.where(own, b_h[task], 0.0)
        if PASSES == 0:
            b_own *= load_scale(scales, task, token, sizes)[:, None]
        b_rotated += (b_own,)
    return b_rotated


@triton.jit(do_not_specialize=["num_tokens", "inner", "start", "stop"])
def _pair_dots(
    grads,
    scales,
    basis,
    units,
    dots,
    num_tokens,
    inner,
    p,
    strides,
    basis_strides,
    ranks,
    start,
    stop,
    K: tl.constexpr,
    G: tl.constexpr,
    PASSES: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dots[segment, pair, token of the slab] = sum of h_i h_j over the segment, in the tokens' scales."""
    sizes = num_tokens, inner
    segment = tl.program_id(0)  # of one tile of tokens all segments side by side: its gradients come to the cache once
    token = start + tl.program_id(1) * BT + tl.arange(0, BT)  # [BT]
    rows = token_offset(token, sizes, strides)  # [BT]
    first, last = _segment(segment, ranks, p, BN)
    b_h = _rotate(
        grads, scales, basis, units, sizes, p, strides, basis_strides,
        token, rows, first, last, K, G, PASSES, BT, BN, BK,
    )  # fmt: skip
    length = stop - start
    place = dots + segment.to(tl.int64) * (K * (K - 1) // 2) * length + token - start
    for i in tl.static_range(K):
        for j in tl.static_range(i + 1, K):
            tl.store(place, tl.sum(b_h[i] * b_h[j], 1), token < stop)
            place += length


@triton.jit(do_not_specialize=["num_tokens", "inner", "start", "stop"])
def _count(
    dots,
    scales,
    range_,
    null,
    valid,
    nonfinite,
    num_tokens,
    inner,
    p,
    ranks,
    start,
    stop,
    K: tl.constexpr,
    COUNT_ZERO: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """Add what one tile of tokens has of one pair to range_ and null (R, K, K), valid (K, K) and nonfinite."""
    sizes = num_tokens, inner
    i, j = tl.program_id(1) // K, tl.program_id(1) % K
    if i < j:
        token = start + tl.program_id(0) * BT + tl.arange(0, BT)  # [BT]
        inside = token < stop
        compared = inside
        if not COUNT_ZERO:
            compared &= (load_scale(scales, i, token, sizes) != 0) & (load_scale(scales, j, token, sizes) != 0)
        length = tl.cast(stop - start, tl.int64)
        place = dots + _pair(i, j, K) * length + token - start
        stride_segment = length * (K * (K - 1) // 2)
        segments = _segments_below(len(ranks), ranks, p, BN)
        for r in tl.static_range(len(ranks)):
            border = _segments_below(r, ranks, p, BN)
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


@triton.jit(do_not_specialize=["num_tokens", "rank"])
def _mix(h, weights, num_tokens, p, rank, K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """h[i] = sum over j of w_ij h[j] in place, w the range weights (pair, token) for c < rank, the null ones above."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    channel = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    mask = (token < num_tokens)[:, None] & (channel < p)[None, :]
    below = (channel < rank)[None, :]
    own = h + token[:, None] * p + channel[None, :]
    stride_task = tl.cast(num_tokens, tl.int64) * p
    b_h = ()
    for task in tl.static_range(K):
        b_h += (tl.load(own + task * stride_task, mask, 0.0),)  # [BT, BC]
    for i in range(K):
        b_sum = tl.zeros([BT, BC], tl.float32)
        for j in tl.static_range(K):
            another = token < tl.where(i == j, 0, num_tokens)
            pair = _pair(tl.minimum(i, j), tl.maximum(i, j), K)
            place = weights + pair * tl.cast(num_tokens, tl.int64) + token
            b_range = tl.load(place, another, 0.0)[:, None]
            b_null = tl.load(place + tl.cast(num_tokens, tl.int64) * (K * (K - 1) // 2), another, 0.0)[:, None]
            b_sum += tl.where(below, b_range, b_null) * b_h[j]
        tl.store(own + i * stride_task, b_sum, mask)


@triton.jit
def _pair(i, j, K: tl.constexpr):
    """The place of i < j in itertools.combinations(range(K), 2)."""
    return i * (2 * K - i - 1) // 2 + j - i - 1


class _Rotation:
    """The scaled operands of a rotation, its tile, and its launches."""

    def __init__(self, grads: Tensor, basis: Tensor) -> None:
        self.grads = collapse(grads, keep=1)
        self.num_tasks, outer, inner, self.p = self.grads.shape
        self.num_pairs = self.num_tasks * (self.num_tasks - 1) // 2
        self.num_tokens = outer * inner
        self.sizes = self.num_tokens, inner
        self.passes = _passes(grads.dtype, basis.dtype)
        self.tile = tile(self.grads, self.passes)
        self.scales = grads.new_empty((self.num_tasks, self.num_tokens), dtype=torch.float32)
        grid = (triton.cdiv(self.num_tokens, 8), self.num_tasks)
        block = min(1024, triton.next_power_of_2(self.p))
        scale_tokens[grid](self.grads, self.scales, *self.sizes, self.p, self.grads.stride(), BT=8, BC=block)
        basis = in_reach(basis)
        self.basis, self.units = basis, self.scales  # units belong to a split basis
        if self.passes:
            self.basis = basis.new_empty((2, self.p, self.p), dtype=torch.float16)
            self.units = basis.new_empty(self.p, dtype=torch.float32)
            grid = (triton.cdiv(self.p, 16),)
            split_basis[grid](basis, self.basis, self.units, self.p, basis.stride(), BC=64, BN=16)

    def segments(self, ranks: Sequence[int]) -> int:
        width, borders = self.tile.coordinates, [0, *ranks, self.p]
        return sum(triton.cdiv(high, width) - low // width for low, high in pairwise(borders))

    def pair_dots(self, ranks: Sequence[int]) -> Iterator[tuple[Slab, Tensor]]:
        """Slabs of tokens, first and last + 1, with their (segments, P, tokens) dots, float32: valid until the next."""
        segments = self.segments(ranks)
        lines = segments * self.num_pairs
        length = min(self.num_tokens, max(1, SLAB // (4 * lines * self.tile.tokens)) * self.tile.tokens)
        memory = self.scales.new_empty(lines * length)
        for start in range(0, self.num_tokens, length):
            slab = start, min(start + length, self.num_tokens)
            dots = memory[: lines * (slab[1] - start)]
            _pair_dots[(segments, triton.cdiv(slab[1] - start, self.tile.tokens))](
                *(self.grads, self.scales, self.basis, self.units, dots),
                *(*self.sizes, self.p, self.grads.stride(), self.basis.stride()[-2:], tuple(ranks), *slab),
                K=self.num_tasks,
                G=self.tile.tasks,
                PASSES=self.passes,
                BT=self.tile.tokens,
                BN=self.tile.coordinates,
                BK=self.tile.channels,
                num_warps=self.tile.warps,
                num_stages=self.tile.stages,
            )
            yield slab, dots.view(-1, self.num_pairs, slab[1] - start)


def _passes(grads: torch.dtype, basis: torch.dtype) -> int:
    """As few products as are exact; of float32 gradients, as exact as ``torch.get_float32_matmul_precision()``."""
    if grads == torch.float32:
        return 3 if highest() else 1
    return 0 if grads == basis else 2


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
            for slab, dots in rotation.pair_dots(ranks):
                _count[(triton.cdiv(dots.shape[-1], 512), num_tasks**2)](
                    *(dots, rotation.scales, *counts, *rotation.sizes, rotation.p, tuple(ranks), *slab),
                    K=num_tasks,
                    COUNT_ZERO=count_zero_gradients,
                    BT=512,
                    BN=rotation.tile.coordinates,
                )
    return counts  # type: ignore[return-value]


def projected_dots(grads: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(K, ..., p), (p, p) -> range and null dots, (P, ...) float32."""
    num_tasks, *lead, _ = grads.shape
    shape = (num_tasks * (num_tasks - 1) // 2, *lead)
    both = [grads.new_empty((shape[0], math.prod(lead)), dtype=torch.float32) for _ in range(2)]
    if grads.numel():
        with on_device(grads):
            rotation = _Rotation(grads, basis)
            border = triton.cdiv(rank, rotation.tile.coordinates)
            for (start, stop), dots in rotation.pair_dots([rank]):
                for space, part in enumerate((dots[:border], dots[border:])):
                    torch.sum(part, 0, out=both[space][:, start:stop])
            units = torch.where(rotation.scales == 0, 0, 1 / rotation.scales)
            one, other = units[torch.triu_indices(num_tasks, num_tasks, 1, device=grads.device)]
            for dots in both:
                dots *= torch.minimum(one, other)
                dots *= torch.maximum(one, other)  # in this order nothing overflows on the way
    return both[0].view(shape), both[1].view(shape)


def projected_dots_backward(
    grad_range: Tensor, grad_null: Tensor, grads: Tensor, basis: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """dh_i = sum_j w_ij h_j, then dg = U dh and dU = g dh^T: large products, which are the library's."""
    num_tasks, *lead, p = grads.shape
    g, u = grads.reshape(-1, p).float(), basis.float()
    h = g @ u
    if h.numel():
        num_tokens, block_t, block_c = math.prod(lead), 16, 64
        weights = torch.stack([grad_range, grad_null])
        with on_device(h):
            grid = (triton.cdiv(num_tokens, block_t), triton.cdiv(p, block_c))
            _mix[grid](h, weights, num_tokens, p, rank, K=num_tasks, BT=block_t, BC=block_c)
    return (h @ u.mT).to(grads.dtype).view(grads.shape), (g.mT @ h).to(basis.dtype)
