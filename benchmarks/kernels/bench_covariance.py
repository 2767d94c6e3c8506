"""Second moments of all blocks' tokens, added to running sums (Eq. 1)."""

from functools import partial

import torch

from dtme_kernels import token_covariance_
from dtme_kernels.covariance import reference

from .conftest import Shape
from .device import ON_GPU
from .race import Rival, compiled

RIVALS = ["eager", "compiled", *(["addmm", "baddbmm"] if ON_GPU else []), "ours into float64", "ours"]
if not ON_GPU:
    MORE_SHAPES = {"8,192 x 768": Shape(1, 8192, 768, 12, blocks=1)}


def eager(accumulator, tokens):
    """One block after the other: widen, multiply, add."""
    for layer, x in zip(accumulator, tokens, strict=True):
        rows = x.flatten(0, 1).float()
        layer += rows.T @ rows


def addmm(accumulator, tokens):
    """The library's product and sum, low precision in and float32 out, a launch a block."""
    for layer, x in zip(accumulator, tokens, strict=True):
        rows = x.flatten(0, 1)
        torch.addmm(layer, rows.T, rows, out_dtype=torch.float32, out=layer)


def baddbmm(accumulator, stacked):
    """The same in one launch, of tokens that somebody has stacked."""
    torch.baddbmm(accumulator, stacked.mT, stacked, out_dtype=torch.float32, out=accumulator)


def test_covariance(report, device, shape):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    p, rows = shape.channels, shape.images * shape.tokens
    stacked = torch.randn(shape.blocks, shape.images, shape.tokens, p, device=device).to(dtype)
    tokens, flat = list(stacked.unbind()), stacked.flatten(1, 2)

    def rival(function, wide):
        sums = torch.zeros(shape.blocks, p, p, device=device, dtype=torch.float64 if wide else torch.float32)

        def check():
            sums.zero_()
            function(sums, tokens)
            want = flat[-1].double().T @ flat[-1].double()
            torch.testing.assert_close(sums[-1].double(), want, rtol=1e-4, atol=1e-4 * rows)

        return Rival(partial(function, sums, tokens), check)

    def make_rivals():
        functions = {
            "eager": eager,
            "compiled": compiled(reference.token_covariance_),
            "addmm": addmm,
            "baddbmm": lambda sums, _: baddbmm(sums, flat),
            "ours into float64": token_covariance_,
            "ours": token_covariance_,
        }
        return {name: rival(functions[name], "64" in name) for name in RIVALS}

    report(make_rivals, moved=stacked.nbytes + 8 * shape.blocks * p * p, operations=shape.blocks * rows * p * (p + 1))
