"""How the eigenvectors are cut: blocks of equal width are rotated into, and ranks cut blocks into pieces.

A boundary is a multiple of the width or a rank. What lies between two neighbouring boundaries is a piece: the unit in
which dot products leave the chip. What lies between two neighbouring ranks is a segment, a run of whole pieces.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Blocks(NamedTuple):
    """The blocks, pieces and segments of p coordinates, and the segment that is left out at first, if one is."""

    width: int
    number: int
    starts: tuple[int, ...]
    """The first piece of every segment, and the number of pieces."""
    skipped: int = -1
    """Of the segments; -1 for none."""
    first_skipped: int = 0
    """The first block that lies in the skipped segment as a whole."""
    num_skipped: int = 0
    touched: tuple[int, int] = (0, 0)
    """The first and last + 1 block that has something of the skipped segment."""

    @property
    def pieces(self) -> int:
        return self.starts[-1]


def cut(p: int, ranks: Sequence[int], width: int, skip: bool) -> Blocks:
    """Cut p coordinates at increasing ranks. With ``skip``, leave out the widest segment, if that spares a block."""
    cuts = [0, *ranks, p]
    starts = tuple(-(-c // width) + sum(r < c and r % width > 0 for r in ranks) for c in cuts)
    number = -(-p // width)
    if skip:
        sizes = [high - low for low, high in pairwise(cuts)]
        widest = sizes.index(max(sizes))
        low, high = cuts[widest], cuts[widest + 1]
        # the last block may end beyond p
        first, end = -(-low // width), number if high == p else high // width
        if end > first:
            return Blocks(width, number, starts, widest, first, end - first, (low // width, -(-high // width)))
    return Blocks(width, number, starts)
