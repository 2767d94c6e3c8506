"""Tiles of the covariance kernels: as many channels as registers hold and as leave little of the last tile empty."""

from typing import NamedTuple

import torch
import triton

from ..launch import chip, highest


class Tile(NamedTuple):
    """Tokens and channels of one kernel's tile, warps, and how many tiles are in flight."""

    tokens: int
    channels: int
    warps: int
    stages: int
    registers: int | None = None
    """Of a thread, at most; unless they are allowed by name, the assembler may spill to have fewer."""
    promote: int = 0
    """``"covariance"``: after so many steps of so many tokens, a sum on tensor cores is added up with rounding."""
    step: int = 0
    """``"gradient"``: channels of the tokens that are multiplied in one step."""

    def options(self) -> dict[str, object]:
        """What a launch takes of it, by the kernels' names."""
        launch = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
        steps = {"PROMOTE": self.promote} if self.promote else {"BK": self.step}
        return {"BT": self.tokens, "BC": self.channels, **steps, **launch}


def tile(kernel: str, p: int, like: torch.Tensor) -> Tile:
    """The tile of one kernel for tokens of p channels.

    128 channels where loads can be vectors and little of the last tile would be empty. Float32 in three parts, on
    tensor cores that take both factors from registers, has no registers for so many.

    Args:
        kernel: ``"covariance"`` or ``"gradient"``.
        like: the tokens.
    """
    wide = like.dtype == torch.float32
    exact = wide and highest()
    if kernel == "gradient":
        return Tile(64, 64, 8, 3, step=16) if exact else Tile(64, 64, 4, 3, step=32)
    fits = not exact or chip(like.device).product != "mma"
    large = fits and p >= 256 and p % 16 == 0 and triton.cdiv(p, 128) * 128 <= 1.2 * triton.cdiv(p, 64) * 64
    tokens = 32 if wide else 64
    promote = 64 * (8 if wide else 16) // tokens  # after 64 additions of the tensor core
    return Tile(tokens, 128 if large else 64, 8 if large else 4, 3 if large or wide else 2, 255, promote)
