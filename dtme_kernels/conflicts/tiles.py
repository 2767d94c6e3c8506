"""How large a rotation's tiles may be: the K accumulators of a program have to stay in registers, all of them."""

from typing import NamedTuple

from torch import Tensor

from ..launch import limits

MAX_TASKS = 16
TOKENS = 64  # the rows of one tensor-core instruction of a warp group


class Tile(NamedTuple):
    """Coordinates and channels of a tile, beside its ``TOKENS`` tokens; warps; stages of the pipeline, at most."""

    coordinates: int
    channels: int
    warps: int
    stages: int


# {passes: {tasks, at most: the tile}}. The traffic to the L2 cache goes with K / coordinates + 2 / TOKENS, so coordinates
# come first: as many as ``python -m dtme_kernels.info --aot`` shows without a spill, then channels, then stages.
_WITH_WGMMA = {
    0: {5: Tile(128, 64, 8, 3), 8: Tile(64, 64, 8, 3), 11: Tile(64, 32, 8, 4), 16: Tile(32, 32, 8, 3)},
    1: {2: Tile(128, 64, 8, 3), 5: Tile(64, 32, 8, 3), 8: Tile(32, 32, 8, 3), 16: Tile(32, 16, 8, 2)},
    2: {2: Tile(128, 64, 8, 3), 5: Tile(64, 32, 8, 4), 8: Tile(32, 32, 8, 3), 16: Tile(32, 16, 8, 3)},
    3: {2: Tile(128, 32, 8, 3), 4: Tile(64, 32, 8, 3), 5: Tile(64, 16, 8, 3), 8: Tile(32, 16, 8, 3), 16: Tile(16, 16, 8, 2)},
}
_BEFORE = {
    0: {5: Tile(128, 32, 8, 3), 11: Tile(32, 32, 8, 3), 16: Tile(16, 16, 4, 3)},
    1: {2: Tile(128, 32, 8, 3), 8: Tile(32, 16, 8, 3), 16: Tile(16, 16, 8, 2)},
    2: {2: Tile(128, 32, 8, 3), 5: Tile(32, 16, 8, 3), 11: Tile(16, 16, 4, 2), 16: Tile(16, 16, 8, 1)},
    3: {2: Tile(128, 32, 8, 3), 8: Tile(32, 16, 8, 3), 16: Tile(16, 16, 8, 2)},
}


def tile(grads: Tensor, passes: int) -> Tile:
    """For gradients (K, outer, inner, p), K <= ``MAX_TASKS``; no more stages than their device has shared memory for."""
    num_tasks, *_, p = grads.shape
    shared = limits(grads.device).shared_memory
    table = _WITH_WGMMA if shared > 200 * 1024 else _BEFORE
    *strides, one = grads.stride()
    vectors = one == 1 and grads.data_ptr() % 16 == 0 and not any(n % 16 for n in (p, *strides))
    # where every number is loaded by itself, addresses take the registers: the tile of many tasks
    found = next(tile for most, tile in table[passes].items() if most >= (num_tasks if vectors else MAX_TASKS))
    gradients = num_tasks * TOKENS * found.channels * grads.element_size()
    basis = 2 * found.channels * found.coordinates * max(1, min(passes, 2))
    return found._replace(stages=max(1, min(found.stages, (shared - 4096) // (gradients + basis))))
