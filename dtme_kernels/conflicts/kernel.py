"""Triton: the pairwise dots of all tasks' gradients in two spaces from one rotation into the smaller of them.

The fewest bytes are one read of the gradients, ``K M p`` numbers; the fewest operations one product with a basis of the
smaller space, ``2 K M p min(m, p - m)``, and ``2 P M p`` for the dots. A first launch reads the gradients and leaves a
copy in float16, scaled, for tensor cores to load as it is, and with it every token's norms and whole dots <g_i, g_j>.
The rotation takes a tile of tokens of all K tasks into one block of eigenvectors: the coordinates stay in registers,
and what leaves is P numbers per token and block. Blocks give a GPU enough programs, and a rank cuts a block in two, so
that any number of ranks costs one rotation. A third launch looks at the signs and counts.

With an orthonormal basis the dot in the larger space is the whole one less that in the smaller. Where the difference is
so small that rounding could have made its sign (``basis`` has the bound), the pair is listed at that token, and both
spaces are rotated into after all: by the pair, where few are listed; all tokens, where many are. Which, a launch sees
for itself: the host waits for nothing. Signs in the null space hang on the last bits of large numbers that cancel, so
nothing is rounded to the gradients' precision: a rotation is 1, 2 or 3 products of float16 numbers (``precision``).
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
from torch import Tensor

from ..launch import chip, collapse, on_device
from .backward import projected_dots_backward as projected_dots_backward
from .basis import CHANNELS, prepare
from .blocks import cut
from .counting import count
from .precision import ONE_PRODUCT, precision_of
from .rotation import encode, pair_dots, settle
from .scaling import prepare_gradients
from .tiles import tile

SLAB = 2**26  # bytes of copies and dots at a time
NEVER = 2**31 - 1


class _Slab:
    """Some of the tokens, from start to stop: scaled copies of their gradients, and the memory for their dots."""

    def __init__(self, rotation: "_Rotation", start: int, stop: int) -> None:
        self.rotation, self.start, self.stop = rotation, start, stop
        r, like = rotation, rotation.grads
        self.rows = triton.cdiv(stop - start, r.tile.tokens) * r.tile.tokens
        wide = partial(torch.empty, dtype=torch.float32, device=like.device)
        terms = r.precision.grad_terms
        self.terms = torch.empty(terms, r.num_tasks, self.rows, r.height, dtype=torch.float16, device=like.device)
        self.scales = wide(r.num_tasks, self.rows)
        self.norms, self.totals = self.scales, self.scales  # unless they are wanted
        if r.blocks.skipped >= 0:
            self.norms, self.totals = (wide(n, self.rows) for n in (r.num_tasks, r.num_pairs))
        self.dots = wide(r.blocks.pieces, r.num_pairs, self.rows)
        prepare_gradients[(triton.cdiv(self.rows, r.totals_tile.tokens),)](
            *(like, self.terms, self.scales, self.norms, self.totals),
            *(like.shape[2], start, stop, self.rows, r.p, r.height, like.stride()),
            K=r.num_tasks,
            G=r.totals_tile.tasks,
            TERMS=terms,
            TOTALS=r.blocks.skipped >= 0,
            **r.totals_tile.options(),
        )

    def rotate(self, undecided: Tensor, begin: int, number: int, hole_at: int, hole: int, limit: int) -> None:
        """Into so many blocks from ``begin`` on, as ``pair_dots`` counts them."""
        r = self.rotation
        if number:
            pair_dots[(number, self.rows // r.tile.tokens)](
                *(self.terms, r.basis.terms, r.basis.units, self.dots, undecided, self.rows, r.height),
                *(r.basis.terms.shape[-1], encode(r.ranks), begin, hole_at, hole, limit),
                K=r.num_tasks,
                G=r.tile.tasks,
                **r.options,
            )


class _Rotation:
    """A basis, how its eigenvectors are cut, and the gradients to come, slab by slab."""

    def __init__(self, grads: Tensor, basis: Tensor, ranks: Sequence[int], skip: bool) -> None:
        self.grads = collapse(grads, keep=1)
        self.num_tasks, outer, inner, self.p = self.grads.shape
        self.num_pairs = self.num_tasks * (self.num_tasks - 1) // 2
        self.num_tokens = outer * inner
        self.ranks = tuple(ranks)
        self.precision = precision_of(grads.dtype, basis.dtype)
        self.tile = tile("rotation", self.num_tasks, grads, len(ranks), self.precision)
        self.totals_tile = tile("totals", self.num_tasks, grads)
        # one product of 11 bits each is too coarse to take differences of
        self.blocks = cut(self.p, ranks, self.tile.coordinates, skip and self.precision != ONE_PRODUCT)
        self.height = triton.cdiv(self.p, CHANNELS) * CHANNELS
        sum_terms = self.height // self.totals_tile.channels + self.totals_tile.channels.bit_length()
        bounded = sum_terms if self.blocks.skipped >= 0 else None
        self.basis = prepare(basis, self.precision, self.tile.channels, bounded)
        terms = {"GRAD_TERMS": self.precision.grad_terms, "BASIS_TERMS": self.precision.basis_terms}
        self.options = terms | self.tile.options()

    def slabs(self) -> Iterator[_Slab]:
        copies = 2 * self.precision.grad_terms * self.num_tasks * self.height
        per_token = copies + 4 * self.num_pairs * (self.blocks.pieces + 1)
        length = max(1, SLAB // (per_token * self.tile.tokens)) * self.tile.tokens
        for start in range(0, self.num_tokens, length):
            yield _Slab(self, start, min(start + length, self.num_tokens))


def count_conflicts(
    grads: Tensor, basis: Tensor, ranks: Sequence[int], count_zero_gradients: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(K, ..., p), (p, p), R increasing ranks -> range and null (R, K, K), valid (K, K), nonfinite (), all int64."""
    num_tasks = len(grads)
    shapes = (len(ranks), num_tasks, num_tasks), (len(ranks), num_tasks, num_tasks), (num_tasks, num_tasks), ()
    counts = tuple(torch.zeros(shape, dtype=torch.int64, device=grads.device) for shape in shapes)
    if grads.numel():
        with on_device(grads):
            rotation = _Rotation(grads, basis, ranks, skip=True)
            for slab in rotation.slabs():
                _count(rotation, slab, counts, count_zero_gradients)
    return counts  # type: ignore[return-value]


def max_listed(num_tasks: int, rows: int) -> int:
    """Two gradients are rotated per listed pair. From twice as many on, rotating all K would be less."""
    return max(1, num_tasks * rows // 4)


def _count(r: _Rotation, slab: _Slab, counts: tuple[Tensor, ...], count_zero_gradients: bool) -> Tensor:
    """Add to the counts, and return how many (pair, token)s were undecided, (1,)."""
    blocks, length = r.blocks, slab.stop - slab.start
    limit = max_listed(r.num_tasks, slab.rows)
    undecided = torch.zeros(1, dtype=torch.int32, device=r.grads.device)
    items = torch.empty(limit if blocks.skipped >= 0 else 1, dtype=torch.int32, device=r.grads.device)

    def count_signs(settling: bool) -> None:
        count[(triton.cdiv(length, 128), r.num_pairs)](
            *(slab.dots, slab.scales, slab.norms, slab.totals, r.basis.doubt, counts, undecided, items),
            *(r.num_tasks, slab.rows, length, encode(blocks.starts), blocks.skipped, limit, int(settling)),
            COUNT_ZERO=count_zero_gradients,
            BT=128,
        )

    slab.rotate(undecided, 0, blocks.number - blocks.num_skipped, blocks.first_skipped, blocks.num_skipped, -1)
    count_signs(settling=False)
    if blocks.skipped < 0:
        return undecided
    low, high = (0, *r.ranks, r.p)[blocks.skipped : blocks.skipped + 2]
    programs = min(2 * chip(r.grads.device).multiprocessors, triton.cdiv(limit, r.tile.tokens))
    settle[(programs,)](
        *(slab.terms, r.basis.terms, r.basis.units, slab.dots, undecided, items, r.num_tasks, slab.rows),
        *(r.height, r.basis.terms.shape[-1], *blocks.touched, low, high),
        *(blocks.starts[blocks.skipped], limit),
        **r.options,
    )
    slab.rotate(undecided, blocks.first_skipped, blocks.num_skipped, NEVER, 0, limit)
    count_signs(settling=True)
    return undecided


def projected_dots(grads: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(K, ..., p), (p, p) -> range and null dots, (P, ...) float32."""
    num_tasks, *lead, _ = grads.shape
    shape = (num_tasks * (num_tasks - 1) // 2, *lead)
    both = [grads.new_empty((shape[0], math.prod(lead)), dtype=torch.float32) for _ in range(2)]
    if grads.numel():
        first, second = torch.triu_indices(num_tasks, num_tasks, 1, device=grads.device)
        with on_device(grads):
            rotation = _Rotation(grads, basis, [rank], skip=False)
            ignored, border = grads.new_empty(1, dtype=torch.int32), rotation.blocks.starts[1]
            for slab in rotation.slabs():
                slab.rotate(ignored, 0, rotation.blocks.number, NEVER, 0, -1)
                units = torch.where(slab.scales == 0, 0, 1 / slab.scales)[:, : slab.stop - slab.start]
                one, other = units[first], units[second]
                for dots, part in zip(both, slab.dots.tensor_split([border]), strict=True):
                    own = dots[:, slab.start : slab.stop]
                    torch.sum(part[..., : slab.stop - slab.start], 0, out=own)
                    own *= torch.minimum(one, other)
                    own *= torch.maximum(one, other)  # in this order nothing overflows on the way
    return both[0].view(shape), both[1].view(shape)
