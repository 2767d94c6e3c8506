"""Tiles of the attention kernels, by head dimension and dtype: chosen so that nothing spills on sm_80 to sm_100."""

from typing import NamedTuple

import torch

from ..launch import highest


class Tiles(NamedTuple):
    """Of one kernel: queries and keys of a tile, warps, and how many tiles are in flight."""

    queries: int
    keys: int
    warps: int
    stages: int

    def options(self, task_keys: int | None = None) -> dict[str, object]:
        """Of a launch, by the kernels' names; a tile of task keys where the kernel takes them."""
        found = {"BM": self.queries, "BN": self.keys, "num_warps": self.warps, "num_stages": self.stages}
        if task_keys is not None:
            found["BT"] = 16 if task_keys <= 16 else 32
        return found | {"PRECISION": "tf32x3" if highest() else "tf32"}

    @classmethod
    def forward(cls, channels: int, dtype: torch.dtype) -> "Tiles":
        return cls(128, 64, 4, 3)

    @classmethod
    def query_gradients(cls, channels: int, dtype: torch.dtype) -> "Tiles":
        return cls(128, 64, 8, 3)

    @classmethod
    def key_gradients(cls, channels: int, dtype: torch.dtype) -> "Tiles":
        return cls(64, 128, 8, 3)

    @classmethod
    def mask_gradients(cls, channels: int, dtype: torch.dtype) -> "Tiles":
        return cls(64, 64, 4, 2)
