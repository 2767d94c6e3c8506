"""Pairwise conflicts of one block's task gradients in both spaces (Eq. 4)."""

from functools import cache, partial
from itertools import combinations

import torch

from dtme_kernels import count_conflicts

from .conftest import SHAPES, Shape
from .device import ON_GPU
from .race import Rival, compiled

MORE = ["library chunks", "ours, low-precision basis"] if ON_GPU else []
RIVALS = ["printed", "reference", "compiled", "GEMM", *MORE, "ours"]
if ON_GPU:
    MORE_SHAPES = {f"ViT-B, 512 px, K={k}": SHAPES["ViT-B, 512 px"]._replace(tasks=k) for k in (4, 11)}
else:
    MORE_SHAPES = {"4,096 x 768, K=5": Shape(1, 4096, 768, 12, tasks=5)}


def printed(grads, basis, rank):
    """Eq. 4 as printed: both projectors, both projections of every gradient, every pair's products."""
    counts = []
    for u in (basis[:, :rank], basis[:, rank:]):
        projected = grads @ (u @ u.T)
        pairs = combinations(range(len(grads)), 2)
        counts.append(torch.stack([((projected[i] * projected[j]).sum(-1) <= 0).sum() for i, j in pairs]))
    return torch.stack(counts)


def count_dots(h, rank):
    """range and null, (2, P)."""
    pairs = list(combinations(range(len(h)), 2))
    spaces = (h[..., :rank], h[..., rank:])
    return torch.stack([torch.stack([((x[i] * x[j]).sum(-1) <= 0).sum() for i, j in pairs]) for x in spaces])


def rotated(grads, basis, rank):
    """The formula as a compiler would like it: one rotation, the dots of its coordinates."""
    return count_dots((grads @ basis).float(), rank)


def library_chunks(grads, basis, rank, count):
    """The library's product into float32 chunks of 16 MB, which a compiled kernel counts while they are cached."""
    num_tasks, _, p = grads.shape
    counts = 0
    for chunk in grads.split(max(1, 2**24 // (4 * num_tasks * p)), 1):
        h = torch.mm(chunk.flatten(0, 1), basis, out_dtype=torch.float32)
        counts = counts + count(h.view(num_tasks, -1, p), rank)
    return counts


def ours(grads, basis, rank, impl="auto"):
    counts = count_conflicts(grads, basis, rank, impl=impl)
    first, second = torch.triu_indices(len(grads), len(grads), 1)
    return torch.stack([counts.range[first, second], counts.null[first, second]])


def test_conflicts(report, device, shape):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    p, rows = shape.channels, shape.images * shape.tokens
    rank = 250 * p // 768  # about a third, and no multiple of anything
    basis = torch.linalg.qr(torch.randn(p, p, device=device, dtype=torch.float64)).Q
    amplitude = torch.where(torch.arange(p, device=device) < rank, 10.0, 1.0)  # range over null energy: about 100
    grads = (torch.randn(shape.tasks, rows, p, device=device) * amplitude @ basis.T.float()).to(dtype)
    wide, low = basis.float(), basis.to(dtype)

    @cache
    def exact():
        return ours(grads.double(), basis, rank, "reference")

    def check(name, count):
        wrong = ((count() - exact()).abs().sum() / (exact().numel() * rows)).item()
        allowed = 2e-5 if name in ("ours", "reference") else 0.02  # of signs: the others round the basis
        assert wrong <= allowed + 1 / rows, f"{wrong:.2%} of the signs are wrong"

    def make_rivals():
        by_compiler, count = compiled(rotated), compiled(count_dots)
        counting = {
            "printed": partial(printed, grads, low, rank),
            "reference": partial(ours, grads, wide, rank, "reference"),
            "compiled": partial(by_compiler, grads, low, rank),
            "library chunks": partial(library_chunks, grads, low, rank, count),
            "ours, low-precision basis": partial(ours, grads, low, rank),
            "ours": partial(ours, grads, wide, rank),
        }
        timed = counting | {
            "reference": partial(count_conflicts, grads, wide, rank, impl="reference"),
            "GEMM": partial(torch.matmul, grads.flatten(0, 1), low),  # of one gradient a row: what a rotation is
            "ours, low-precision basis": partial(count_conflicts, grads, low, rank),
            "ours": partial(count_conflicts, grads, wide, rank),
        }
        rivals = {name: Rival(timed[name], partial(check, name, count)) for name, count in counting.items()}
        rivals["GEMM"] = Rival(timed["GEMM"])
        return {name: rivals[name] for name in RIVALS}

    operations = shape.tasks * rows * p * (2 * p + shape.tasks - 1)
    report(make_rivals, moved=grads.nbytes + wide.nbytes, operations=operations)
