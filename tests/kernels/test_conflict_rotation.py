"""How the Triton kernels save half of a rotation: the cuts, the bound, the list of doubtful pairs, the kept basis."""

import gc
import itertools

import pytest
import torch

from dtme_kernels import count_conflicts, launch
from dtme_kernels.conflicts.blocks import cut
from dtme_kernels.testing import make, orthogonal

# test_triton_interpreted runs the others in a process of its own
interpreted = pytest.mark.skipif(not launch.interpreted(), reason="Triton's interpreter is off")


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize(
    ("p", "ranks"), [(768, [250]), (768, [256]), (81, [2, 9, 20, 30, 40]), (64, [63]), (70, [1]), (192, [64, 130, 131])]
)
def test_pieces_are_what_lies_between_boundaries(p, ranks, width):
    boundaries = sorted({*range(0, p, width), *ranks})
    blocks = cut(p, ranks, width, skip=True)
    assert blocks.number == -(-p // width)
    assert blocks.starts == tuple(sum(b < c for b in boundaries) for c in (0, *ranks, p))
    segments = list(itertools.pairwise((0, *ranks, p)))
    if blocks.skipped < 0:
        assert max(high - low for low, high in segments) < 2 * width
        return
    low, high = segments[blocks.skipped]
    assert high - low == max(high - low for low, high in segments)
    inside = [b for b in range(blocks.number) if low <= b * width and min(p, b * width + width) <= high]
    assert [*range(blocks.first_skipped, blocks.first_skipped + blocks.num_skipped)] == inside
    touched = [b for b in range(blocks.number) if b * width < high and b * width + width > low]
    assert [*range(*blocks.touched)] == touched
    assert cut(p, ranks, width, skip=False).num_skipped == 0


@pytest.fixture
def launches(monkeypatch):
    """{"settle": [...], ...}: the arguments of every launch."""
    from dtme_kernels.conflicts import basis, kernel

    found = {}

    class Recorded:
        def __init__(self, name, function):
            self.name, self.function = name, function

        def __getitem__(self, grid):
            def run(*args, **kwargs):
                found.setdefault(self.name, []).append(args)
                self.function[grid](*args, **kwargs)

            return run

    for module, name in ((kernel, "pair_dots"), (kernel, "settle"), (basis, "split_basis")):
        monkeypatch.setattr(module, name, Recorded(name, getattr(module, name)))
    return found


def weak(amplitude, p=192, rank=64, tokens=130):
    basis = orthogonal(p)
    strength = torch.cat([torch.full((rank,), float(amplitude)), torch.ones(p - rank)]).double()
    return (make(3, tokens, p, dtype=torch.float64) * strength @ basis.T).float(), basis.float()


def full_rotation(monkeypatch, *args):
    from dtme_kernels.conflicts import kernel

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "cut", lambda p, ranks, width, skip: cut(p, ranks, width, False))
        return count_conflicts(*args, impl="triton")


@interpreted
@pytest.mark.parametrize(("amplitude", "share"), [(1, (0, 0.01)), (30, (0.02, 0.25)), (1000, (0.9, 1))])
def test_counts_are_those_of_a_full_rotation(launches, monkeypatch, amplitude, share):
    """Whether no pair is doubtful, some, or all. The null space is the larger one, and not rotated into at first."""
    grads, basis = weak(amplitude)
    got = count_conflicts(grads, basis, 64, impl="triton")
    first, again = launches["pair_dots"]
    assert (first[-4:], again[-4]) == ((0, 1, 2, -1), 1)
    undecided, limit = int(launches["settle"][0][4]), launches["settle"][0][-1]
    assert share[0] <= undecided / (3 * 130) <= share[1]
    assert (undecided > limit) == (amplitude == 1000)
    want = full_rotation(monkeypatch, grads, basis, 64)
    for name in ("range", "null", "valid"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@interpreted
def test_slabs_and_several_ranks_do_not_show(launches, monkeypatch):
    from dtme_kernels.conflicts import kernel

    grads, basis = weak(30, p=200, rank=70)
    ranks = [30, 70, 71]
    want = [full_rotation(monkeypatch, grads, basis, rank) for rank in ranks]
    monkeypatch.setattr(kernel, "SLAB", 2**17)
    launches.clear()
    got = count_conflicts(grads, basis, ranks, impl="triton")
    assert len(launches["settle"]) > 1
    for own, other in zip(got, want, strict=True):
        assert torch.equal(own.range, other.range)
        assert torch.equal(own.null, other.null)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_bound_bounds(dtype, aligned):
    """What a dot and the sum of its parts differ by: random gradients, and such as have one sign in all coordinates."""
    from dtme_kernels.conflicts import kernel

    basis = orthogonal(192)
    grads = make(3, 70, 192, dtype=torch.float64)
    if aligned:
        grads = grads.abs() @ basis.T
    rotation = kernel._Rotation(grads.to(dtype), basis, [60], skip=True)
    (slab,) = rotation.slabs()
    slab.rotate(torch.zeros(1, dtype=torch.int32), 0, rotation.blocks.number, kernel.NEVER, 0, -1)
    first, second = torch.triu_indices(3, 3, 1)
    off = (slab.totals.double() - slab.dots.double().sum(0)).abs() / (slab.norms[first] * slab.norms[second])
    assert 0 < off[:, :70].max() < rotation.basis.doubt


@interpreted
def test_a_basis_is_split_once_and_again_when_written_to(launches):
    grads, basis = weak(1, tokens=9)
    stack = torch.stack([basis, basis.flip(1)])
    for _ in range(2):
        for own in stack:  # views, which are other objects every time
            count_conflicts(grads, own, 64, impl="triton")
    assert len(launches["split_basis"]) == 2
    stack[0] = stack[1]
    one, other = (count_conflicts(grads, own, 64, impl="triton").null for own in stack)
    assert torch.equal(one, other)
    assert len(launches["split_basis"]) == 4, "torch counts the writes to both together"
    with torch.inference_mode():  # tensors whose writes nobody counts
        inference = basis.clone()
        for _ in range(2):
            count_conflicts(grads, inference, 64, impl="triton")
    assert len(launches["split_basis"]) == 6


@interpreted
def test_memory_that_another_basis_has_had_is_not_mistaken_for_it():
    from dtme_kernels.conflicts import basis as module

    grads, _ = weak(1, tokens=9)
    module._kept.clear()
    for seed in range(4):
        basis = orthogonal(192, seed=seed, dtype=torch.float32)
        want = count_conflicts(grads, basis, 64, impl="reference")
        assert torch.equal(count_conflicts(grads, basis, 64, impl="triton").null, want.null)
        del basis
        gc.collect()
    assert len(module._kept) == 1, "bases that are gone are forgotten"
