"""Tiles of the modulation kernels: whole rows, which stay in registers while the streams take turns on them."""

from typing import NamedTuple

import torch
import triton

from ..launch import chip

REGISTERS = 65536  # of a multiprocessor
MAX_REGISTERS = 255  # of a thread
OTHER_REGISTERS = 40  # addresses and what else the backward holds, about


class Tile(NamedTuple):
    """Rows of one kernel's tile, in pieces of ``width`` channels, and warps."""

    rows: int
    width: int
    warps: int
    stages: int = 0
    """``"backward"``: tiles in flight; later rows are fetched while these are worked on."""
    registers: int | None = None
    """Of a thread, at most: as many as leave room for the ``resident`` programs."""
    streams: int = 0
    """``"backward"``: at a time; what their norms need to know of a row is summed by one reduction."""
    resident: int = 0
    """``"backward"``: programs that share a multiprocessor."""

    def options(self) -> dict[str, object]:
        """What a launch takes of it, by the kernels' names."""
        launch = {"num_warps": self.warps, "maxnreg": self.registers}
        backward = {"STAGES": self.stages, "G": self.streams} if self.stages else {}
        return {"BR": self.rows, "BP": self.width, **backward, **launch}

    def elements(self, p: int) -> int:
        """How many of the tile a thread has, one or more of each piece."""
        return triton.cdiv(p, self.width) * (self.rows * self.width // (32 * self.warps))


def tile(kernel: str, p: int, like: torch.Tensor, streams: int = 1, norm: bool = False) -> Tile:
    """The tile of one kernel for rows of p channels.

    Forward, 16 bytes of a low precision a thread, and as few warps to a row as registers allow. Backward, two tiles are
    fetched ahead, or as many bytes, if there is room.

    Args:
        kernel: ``"forward"`` or ``"backward"``.
        like: the tokens.
        streams: that one program of the backward sums.
        norm: whether the backward is also that of the norm.
    """
    if kernel == "forward":
        return _whole_rows(p, 1 if p <= 1024 else 2 if p <= 2048 else 4, 8)
    block, gpu, size = _backward(p, like.dtype), chip(like.device), like.element_size()
    threads, elements = 32 * block.warps, block.elements(p)
    # sums, parameters, what waits for the sums of a row
    needed = min(MAX_REGISTERS, elements * (6 * streams + 5 if norm else 4 * streams + 3) + OTHER_REGISTERS)
    resident = max(1, REGISTERS // (threads * needed))
    staged = 1024 + threads * elements * size * (1 + streams * (1 + norm))
    return block._replace(
        stages=1 + min(4 // size, gpu.shared_memory // (staged * resident)),
        registers=min(MAX_REGISTERS, REGISTERS // (threads * resident) // 8 * 8),
        streams=1 if size == 4 and gpu.capability < 90 else 2,  # else Triton 3.6 spills there
        resident=resident,
    )


def max_streams(p: int, like: torch.Tensor, norm: bool) -> int:
    """As many as the registers of one launch of the backward hold: ``tile`` counts what they take."""
    per_element = (MAX_REGISTERS - OTHER_REGISTERS) // _backward(p, like.dtype).elements(p)
    return max(1, (per_element - 5) // 6 if norm else (per_element - 3) // 4)


def _whole_rows(p: int, warps: int, lanes: int) -> Tile:
    """A row in about three pieces or more, of each of which a thread has so many elements."""
    width = min(triton.next_power_of_2(triton.cdiv(p, 3)), 32 * warps * lanes)
    return Tile(32 * warps * lanes // width, width, warps)


def _backward(p: int, dtype: torch.dtype) -> Tile:
    """At least 4 bytes a thread, as fewer are not fetched ahead, where rows are aligned to that; little padding."""
    warps = 4 if p <= 768 else 8
    one, two = _whole_rows(p, warps, 1), _whole_rows(p, warps, 2)
    padded = [triton.cdiv(p, tile.width) * tile.width for tile in (one, two)]
    fits_better = warps == 8 and dtype == torch.float32 and padded[0] < padded[1]
    return one if p % 2 or fits_better else two
