"""How large tiles may be: the sums that a program keeps per task have to stay in registers, all of them."""

from typing import NamedTuple

import torch

from ..launch import chip
from .precision import ONE_PRODUCT, Precision

MAX_TASKS = 16


class Tile(NamedTuple):
    """Tokens, coordinates (eigenvectors) and channels of one kernel's tile, warps, and stages at most."""

    tokens: int
    coordinates: int
    """0 for a kernel that does not rotate."""
    channels: int
    warps: int
    stages: int
    tasks: int = MAX_TASKS
    """In one loop over the channels."""
    registers: int | None = 255
    """Of a thread, at most; unless they are allowed by name, the assembler may spill to have fewer."""

    def options(self) -> dict[str, object]:
        """What a launch takes of it, by the kernels' names."""
        launch = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
        rotated = {"BN": self.coordinates} if self.coordinates else {}
        return {"BT": self.tokens, **rotated, "BK": self.channels, **launch}


# {what multiplies: {tasks, up to which: the tile}}: as many coordinates as ``python -m dtme_kernels.info --aot`` shows
# without a spill, for what is loaded per product goes with K / coordinates + 1 / tokens. Four warps, so that two
# programs share a multiprocessor: while one waits for a product to add it up, the other multiplies.
_ROTATION = {
    "wgmma": {5: Tile(64, 64, 32, 4, 3), 8: Tile(64, 32, 32, 4, 3, 4), 16: Tile(64, 16, 32, 4, 3, 4)},
    # products x tasks x coordinates of one loop have to fit its 512 columns of memory: else Triton compiles a trap
    "tcgen05": {3: Tile(64, 64, 32, 4, 3, 2), 8: Tile(64, 32, 32, 4, 3, 4), 16: Tile(64, 16, 32, 4, 3, 4)},
    "mma": {8: Tile(64, 32, 32, 4, 3, 2), 16: Tile(64, 16, 32, 4, 3, 2)},
}
# {tasks, up to which: the tile}: each task of a loop is multiplied by all later ones, and every pair has a sum
_TOTALS = {5: Tile(16, 0, 64, 4, 3, 5, None), 8: Tile(16, 0, 32, 4, 3, 4), 16: Tile(16, 0, 32, 4, 3, 3)}


def tile(
    kernel: str, num_tasks: int, like: torch.Tensor, num_ranks: int = 1, precision: Precision = ONE_PRODUCT
) -> Tile:
    """The tile of one kernel for K <= ``MAX_TASKS`` tasks; no more stages than half of the shared memory has room for.

    Args:
        kernel: ``"rotation"``, or ``"totals"`` for the one that reads the gradients first.
        like: a tensor on the device of all.
        num_ranks: several want registers too, as many as one more task.
        precision: of the rotation.
    """
    if kernel == "totals":
        return next(tile for limit, tile in _TOTALS.items() if num_tasks <= limit)
    gpu = chip(like.device)
    needed = min(num_tasks + (num_ranks > 1), MAX_TASKS)
    largest = next(tile for limit, tile in _ROTATION[gpu.product].items() if needed <= limit)
    gradients = min(num_tasks, largest.tasks) * largest.tokens * precision.grad_terms
    per_stage = 2 * largest.channels * (gradients + precision.basis_terms * largest.coordinates)
    return largest._replace(stages=max(1, min(largest.stages, (gpu.shared_memory // 2 - 1024) // per_stage)))
