"""``python -m benchmarks.kernels.conflict_work``: how many multiply-adds counting conflicts takes, and a full rotation.

Without a GPU, with TRITON_INTERPRET=1 and few tokens: what is counted does not depend on what counts it.
"""

import argparse
import os
from collections.abc import Iterator

import torch

from dtme_kernels import count_conflicts
from dtme_kernels.testing import make, orthogonal

RATIOS, AMPLITUDES = (0.02, 0.1, 0.33, 0.5), (10, 100, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.conflict_work", description=__doc__)
    parser.add_argument("--tokens", type=int, default=6144 if torch.cuda.is_available() else 128)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", help="of the gradients; the basis is float32")
    chosen = parser.parse_args()
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("wants a GPU, or TRITON_INTERPRET=1")
    for line in table(chosen.tasks, chosen.tokens, chosen.channels, getattr(torch, chosen.dtype)):
        print(line, flush=True)


def table(num_tasks: int, num_tokens: int, p: int, dtype: torch.dtype) -> Iterator[str]:
    """A line per ratio of range to null amplitude and share m / p of the range; gradients of Gaussian coordinates."""
    yield "range : null   m / p  undecided  GMAC full     GMAC  ratio  signs that differ"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    basis = orthogonal(p).to(device)
    for amplitude in AMPLITUDES:
        for ratio in RATIOS:
            rank = round(ratio * p)
            strength = torch.where(torch.arange(p, device=device) < rank, float(amplitude), 1.0)
            grads = make(num_tasks, num_tokens, p, dtype=torch.float64, seed=rank, device=device)
            grads = (grads * strength @ basis.T).to(dtype)
            undecided, work, full = multiply_adds(grads, basis.float(), rank)
            differ = differences(grads, basis.float(), rank)
            numbers = f"{undecided:>11.3%}{full / 1e9:>11.3f}{work / 1e9:>9.3f}{work / full:>7.2f}{differ:>19}"
            yield f"{amplitude:>8} : 1{ratio:>8.2f}{numbers}"


def multiply_adds(grads: torch.Tensor, basis: torch.Tensor, rank: int) -> tuple[float, int, int]:
    """The share of (pair, token)s that were undecided; multiply-adds of the rotation, and of a full one."""
    from dtme_kernels.conflicts import kernel

    num_tasks = len(grads)
    shapes = (1, num_tasks, num_tasks), (1, num_tasks, num_tasks), (num_tasks, num_tasks), ()
    counts = tuple(torch.zeros(shape, dtype=torch.int64, device=grads.device) for shape in shapes)
    r = kernel._Rotation(grads, basis, [rank], skip=True)
    blocks, undecided, work, full = r.blocks, 0, 0, 0
    for slab in r.slabs():
        found = int(kernel._count(r, slab, counts, False))
        rows = num_tasks * slab.rows
        per_block = r.precision.products * r.height * blocks.width
        again = 2 * found * (blocks.touched[1] - blocks.touched[0])
        if found > kernel.max_listed(num_tasks, slab.rows):
            again = rows * blocks.num_skipped
        undecided += found
        work += (rows * (blocks.number - blocks.num_skipped) + again) * per_block
        full += rows * blocks.number * per_block
    return undecided / (r.num_pairs * r.num_tokens), work, full


def differences(grads: torch.Tensor, basis: torch.Tensor, rank: int) -> int:
    """Signs that differ between these counts and those of a full rotation in float64."""
    got = count_conflicts(grads, basis, rank, impl="triton")
    want = count_conflicts(grads.double(), basis.double(), rank, impl="reference")
    return int(sum((a - b).abs().sum() for a, b in ((got.range, want.range), (got.null, want.null)))) // 2


if __name__ == "__main__":
    main()
