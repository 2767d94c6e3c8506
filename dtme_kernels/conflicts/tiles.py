"""How large a rotation's tiles may be: the K sums of a program have to stay in registers, all of them."""

from typing import NamedTuple

from ..launch import Chip

MAX_TASKS = 16


class Tile(NamedTuple):
    """Tokens, coordinates (eigenvectors) and channels of a tile; warps; stages, at most; tasks in one loop over p."""

    tokens: int
    coordinates: int
    channels: int
    warps: int
    stages: int
    tasks: int = MAX_TASKS


# {what multiplies: {tasks, up to which: the tile}}: as many coordinates as ``python -m dtme_kernels.info --aot`` shows
# without a spill, for what is loaded per product goes with K / coordinates + 1 / tokens. Four warps, so that two
# programs share a multiprocessor: while one waits for a product to add it up, the other multiplies.
_TABLE = {
    "wgmma": {5: Tile(64, 64, 32, 4, 3), 8: Tile(64, 32, 32, 4, 3, 4), 16: Tile(64, 16, 32, 4, 3, 4)},
    # products x tasks x coordinates of one loop have to fit its 512 columns of memory: else Triton compiles a trap
    "tcgen05": {3: Tile(64, 64, 32, 4, 3, 2), 8: Tile(64, 32, 32, 4, 3, 4), 16: Tile(64, 16, 32, 4, 3, 4)},
    "mma": {8: Tile(64, 32, 32, 4, 3, 2), 16: Tile(64, 16, 32, 4, 3, 2)},
}


def tile(chip: Chip, num_tasks: int, passes: int, num_ranks: int) -> Tile:
    """For K <= ``MAX_TASKS`` tasks; no more stages than half of the chip's shared memory has room for."""
    # several ranks want registers too: as many as one more task
    needed = min(num_tasks + (num_ranks > 1), MAX_TASKS)
    found = next(tile for most, tile in _TABLE[chip.product].items() if needed <= most)
    gradients = min(num_tasks, found.tasks) * found.tokens * (2 if passes == 3 else 1)
    per_stage = 2 * found.channels * (gradients + min(passes, 2) * found.coordinates)
    return found._replace(stages=max(1, min(found.stages, (chip.shared_memory // 2 - 1024) // per_stage)))
