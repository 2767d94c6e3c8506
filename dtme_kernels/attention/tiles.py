"""Tiles of the attention kernels: among the usual ones, the largest that spill no register.

Those of mma fit into the 99 KB of shared memory that the smallest of its chips have.
"""

from typing import NamedTuple

import torch

from ..launch import chip, highest

MOST_CHANNELS = 256  # of a head: a tile of them in the registers of one program
MOST_CHANNELS_IN_THREE_PARTS = 64  # of float32 as exact as float32: every operand is three times as large


class Tile(NamedTuple):
    """Queries and keys of one kernel's tile, warps, and how many tiles are in flight."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    """Of a thread, at most; where the assembler would rather spill than use as many, they are allowed by name."""

    def options(self) -> dict[str, object]:
        """What a launch takes of it, by the kernels' names."""
        launch = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
        return {"BM": self.queries, "BN": self.keys, **launch}


PRODUCTS = ("mma", "wgmma", "tcgen05")
# kernel, how it multiplies -> {channels, up to which: tiles for each of PRODUCTS, the last going on}
_TABLE: dict[tuple[str, str], dict[int, tuple[Tile, ...]]] = {
    ("forward", "low"): {
        64: (Tile(64, 64, 4, 3, 255), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
        128: (Tile(64, 32, 4, 2, 255), Tile(128, 64, 8, 2)),
        256: (Tile(64, 32, 8, 2), Tile(128, 32, 8, 2)),
    },
    ("forward", "tf32"): {
        32: (Tile(64, 64, 4, 2), Tile(128, 64, 4, 2)),
        64: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
        128: (Tile(64, 32, 8, 2, 255),),
        256: (Tile(32, 16, 8, 1, 255), Tile(32, 32, 8, 1, 255)),
    },
    ("forward", "tf32x3"): {
        32: (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
        64: (Tile(64, 32, 8, 1), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
    },
    ("query gradients", "low"): {
        64: (Tile(64, 32, 4, 2, 255), Tile(128, 64, 8, 2)),
        128: (Tile(64, 64, 8, 2, 255), Tile(128, 32, 8, 2, 255)),
        256: (Tile(32, 32, 8, 2, 255), Tile(32, 64, 8, 2)),
    },
    ("query gradients", "tf32"): {
        32: (Tile(64, 32, 4, 2), Tile(128, 64, 8, 2)),
        64: (Tile(32, 32, 4, 2, 255), Tile(64, 32, 4, 2)),
        128: (Tile(32, 32, 8, 1, 255),),
        256: (Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
    },
    ("query gradients", "tf32x3"): {
        32: (Tile(16, 32, 4, 1), Tile(64, 32, 4, 2), Tile(16, 32, 4, 1)),
        64: (Tile(16, 32, 4, 1),),
    },
    ("key gradients", "low"): {
        64: (Tile(32, 64, 8, 3), Tile(64, 128, 8, 2), Tile(32, 128, 8, 2)),
        128: (Tile(32, 64, 8, 2), Tile(32, 128, 8, 2)),
        256: (Tile(16, 64, 8, 2), Tile(32, 32, 8, 2, 255)),
    },
    ("key gradients", "tf32"): {
        32: (Tile(64, 128, 8, 2),),
        64: (Tile(32, 32, 8, 1, 255), Tile(32, 64, 8, 1), Tile(32, 64, 8, 1, 255)),
        128: (Tile(32, 32, 8, 1, 255),),
        256: (Tile(16, 16, 8, 1, 255), Tile(16, 32, 8, 1, 255)),
    },
    ("key gradients", "tf32x3"): {
        32: (Tile(16, 64, 4, 1), Tile(32, 64, 4, 2)),
        64: (Tile(16, 32, 8, 1, 255),),
    },
    ("mask gradients", "low"): {
        64: (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
        128: (Tile(64, 32, 4, 2),),
        256: (Tile(32, 32, 8, 2), Tile(64, 32, 8, 1)),
    },
    ("mask gradients", "tf32"): {64: (Tile(64, 32, 4, 2),), 256: (Tile(16, 32, 8, 1),)},
    ("mask gradients", "tf32x3"): {64: (Tile(16, 32, 4, 1),)},
}


def tile(kernel: str, channels: int, like: torch.Tensor) -> Tile:
    """The tile of one kernel for heads of so many channels, padded to a power of two.

    Args:
        kernel: ``"forward"``, ``"query gradients"``, ``"key gradients"`` or ``"mask gradients"``.
        like: a tensor of the dtype and on the device of all.
    """
    precision = "low" if like.dtype != torch.float32 else "tf32x3" if highest() else "tf32"
    tiles = next(tiles for limit, tiles in _TABLE[kernel, precision].items() if channels <= limit)
    return tiles[min(PRODUCTS.index(chip(like.device).product), len(tiles) - 1)]
