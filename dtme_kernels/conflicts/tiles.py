"""How large a rotation's tiles may be: the K accumulators of a program have to stay in registers, all of them."""

from typing import NamedTuple

from torch import Tensor

from ..launch import chip

MAX_TASKS = 16


class Tile(NamedTuple):
    """Tokens, coordinates (eigenvectors) and channels of a tile; warps; stages, at most; tasks in one loop over p."""

    tokens: int
    coordinates: int
    channels: int
    warps: int
    stages: int
    tasks: int = MAX_TASKS


# {passes: {tasks, at most: the tile}}. Traffic to the L2 cache goes with K / coordinates + 2 / tokens, so coordinates
# come first: as many as ``python -m dtme_kernels.info --aot`` shows without a spill, then channels, then stages.
_HOPPER = {
    0: {5: Tile(64, 128, 64, 8, 3), 8: Tile(64, 64, 64, 8, 3), 11: Tile(64, 64, 32, 8, 4), 16: Tile(64, 32, 32, 8, 3)},
    1: {
        2: Tile(64, 128, 64, 8, 3),
        5: Tile(64, 64, 32, 8, 3),
        8: Tile(64, 64, 32, 8, 3, 2),
        16: Tile(64, 32, 32, 8, 3, 4),
    },
    2: {
        2: Tile(64, 128, 64, 8, 3),
        5: Tile(64, 64, 32, 8, 4),
        8: Tile(64, 64, 32, 8, 3, 2),
        16: Tile(64, 32, 32, 8, 3, 4),
    },
    3: {
        2: Tile(64, 128, 32, 8, 3),
        4: Tile(64, 64, 32, 8, 3),
        5: Tile(64, 64, 16, 8, 3),
        8: Tile(64, 32, 32, 8, 3, 4),
        16: Tile(64, 32, 16, 8, 3, 2),
    },
}
# products x tasks x coordinates of one loop have to fit the 512 columns of tensor memory: else Triton compiles a trap
_BLACKWELL_SPLIT = {3: Tile(64, 32, 16, 8, 3, 3), 5: Tile(64, 32, 32, 8, 2, 3), 16: Tile(64, 32, 16, 8, 3, 4)}
_BLACKWELL = {0: _HOPPER[0], 1: _BLACKWELL_SPLIT, 2: _BLACKWELL_SPLIT, 3: _BLACKWELL_SPLIT}
_OLDER_SPLIT = {2: Tile(64, 64, 16, 8, 3), 8: Tile(64, 32, 16, 8, 3, 4), 16: Tile(64, 16, 16, 8, 3, 4)}
_OLDER = {
    0: {5: Tile(64, 128, 32, 8, 3), 11: Tile(64, 32, 32, 8, 3), 16: Tile(64, 16, 16, 4, 3)},
    1: _OLDER_SPLIT,
    2: _OLDER_SPLIT,
    3: _OLDER_SPLIT,
}
# where every number is loaded by itself, addresses take the registers
_WITHOUT_VECTORS = Tile(64, 16, 16, 8, 1, 4)
_GENERATIONS = {9: _HOPPER, 10: _BLACKWELL}


def tile(grads: Tensor, passes: int) -> Tile:
    """For gradients (K, outer, inner, p), K <= ``MAX_TASKS``; no more stages than their chip has shared memory for."""
    num_tasks, *_, p = grads.shape
    *strides, one = grads.stride()
    here = chip(grads.device)
    vectors = one == 1 and grads.data_ptr() % 16 == 0 and not any(n % 16 for n in (p, *strides))
    table = _GENERATIONS.get(here.capability // 10, _OLDER)[passes]
    found = next(tile for most, tile in table.items() if num_tasks <= most) if vectors else _WITHOUT_VECTORS
    gradients = min(num_tasks, found.tasks) * found.tokens * found.channels * grads.element_size()
    basis = 2 * found.channels * found.coordinates * max(1, min(passes, 2))
    return found._replace(stages=max(1, min(found.stages, (here.shared_memory - 4096) // (gradients + basis))))
