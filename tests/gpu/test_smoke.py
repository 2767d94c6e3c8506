"""Every operation in every dtype, forward and backward, small and at a real size, against float64: the first minute.

Each test leaves a JSON line with its worst error and what it may be, if the run wants lines.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import dtme_kernels as dk
from benchmarks.kernels import lines
from benchmarks.kernels.device import DEVICE, LOST_DEVICE, RECORDING
from benchmarks.kernels.race import device_is_lost
from dtme_kernels.testing import accuracy, make, orthogonal

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Size(NamedTuple):
    images: int
    tokens: int
    heads: int
    channels: int
    """Of a head."""
    tasks: int
    task_tokens: int

    @property
    def p(self) -> int:
        return self.heads * self.channels


SIZES = {"small": Size(2, 37, 3, 32, 3, 5), "real": Size(2, 1024, 12, 64, 5, 6)}


class Operation(NamedTuple):
    """``shapes`` of the inputs, in the order in which ``call(impl, size, *inputs)`` takes them."""

    shapes: Callable[[Size], list[tuple[int, ...]]]
    call: Callable[..., object]
    products: bool = True
    """Whether it multiplies matrices, so that the precision of float32 products matters."""


def _tokens(s):
    return s.images, s.tokens, s.p


def _modulation(s):
    return [_tokens(s), *[(s.tasks, s.p)] * 2]


def _attention(s):
    heads = max(1, s.heads // 3)  # few: the scores of float64 are held at once, by every process
    return [(s.tasks, s.images, heads, s.tokens, s.channels)] * 3 + [(s.tasks, heads, s.task_tokens, s.channels)] * 2


def _first_half(s):
    return [*_modulation(s), (s.tasks, s.task_tokens, s.p), (s.p,), (s.p,), (3 * s.p, s.p), (3 * s.p,)]


def _accumulate(impl, s, *layers):
    dtype = torch.promote_types(layers[0].dtype, torch.float32)
    sums = torch.zeros(len(layers), s.p, s.p, dtype=dtype, device=layers[0].device)
    return dk.token_covariance_(sums, [x.detach() for x in layers], impl=impl)


def _block(impl, s, *args):
    options = dict(zip(("norm_weight", "norm_bias", "qkv_weight", "qkv_bias"), args[4:], strict=True))
    return dk.modulate_concat_attention(*args[:4], **options, num_heads=s.heads, impl=impl)


OPERATIONS = {
    "token_covariance": Operation(lambda s: [_tokens(s)], lambda impl, s, x: dk.token_covariance(x, impl=impl)),
    "token_covariance_": Operation(lambda s: [_tokens(s)] * 3, _accumulate),
    "projected_dots": Operation(
        lambda s: [(s.tasks, *_tokens(s)), (s.p, s.p)],
        lambda impl, s, grads, basis: dk.projected_dots(grads, basis, s.p // 3, impl=impl),
    ),
    "modulate": Operation(_modulation, lambda impl, s, *x: dk.modulate(*x, impl=impl), products=False),
    "modulate_layer_norm": Operation(
        lambda s: [*_modulation(s), (s.p,), (s.p,)],
        lambda impl, s, *x: dk.modulate_layer_norm(*x, impl=impl),
        products=False,
    ),
    "expanded_attention": Operation(_attention, lambda impl, s, *x: dk.expanded_attention(*x, impl=impl)),
    "causal attention": Operation(_attention, lambda impl, s, *x: dk.expanded_attention(*x, is_causal=True, impl=impl)),
    "modulate_concat_attention": Operation(_first_half, _block),
}
CASES = [
    (name, kind) for name, operation in OPERATIONS.items() for kind in DTYPES if operation.products or kind != "tf32"
]


@pytest.fixture
def kind(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


def inputs_of(name, s, dtype):
    """Standard normal; a basis is orthogonal and float32, the weight of a projection leaves the scale as it is."""
    inputs = [make(*shape, dtype=dtype, seed=i) for i, shape in enumerate(OPERATIONS[name].shapes(s))]
    if name == "projected_dots":
        inputs[1] = orthogonal(s.p, dtype=torch.float32).to(inputs[0].device)
    if name == "modulate_concat_attention":
        inputs[6] *= s.p**-0.5
    return inputs


def outputs_and_gradients(impl, name, s, inputs, upstream=None):
    """And the gradients that came from above: the same for every implementation, if they are handed on."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = OPERATIONS[name].call(impl, s, *inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    if not outputs[0].requires_grad:
        return outputs, None
    upstream = upstream or [make(*x.shape, seed=10 + i).to(x) for i, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, inputs, [g.to(x.dtype) for g, x in zip(upstream, outputs, strict=True)])
    return [*outputs, *gradients], upstream


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "kind"), CASES, indirect=["kind"])
def test_operation(name, kind, size):
    s, dtype = SIZES[size], DTYPES[kind]
    inputs = inputs_of(name, s, dtype)
    with noted(f"{name}, {kind}, {size}") as note:
        got, upstream = outputs_and_gradients("auto", name, s, inputs)
        if RECORDING:
            return
        named, _ = outputs_and_gradients("triton", name, s, inputs, upstream)
        assert all(torch.equal(a, b) for a, b in zip(got, named, strict=True)), "the kernel named and chosen differ"
        want, _ = outputs_and_gradients("reference", name, s, [x.double() for x in inputs], upstream)
        plain, _ = outputs_and_gradients("reference", name, s, inputs, upstream)
        terms = s.images * s.tokens * s.tasks if dtype == torch.float32 else 30
        for triple in zip(got, want, plain, strict=True):
            note(*accuracy(*triple, terms, 2**-10 if kind == "tf32" else None))


@pytest.mark.parametrize("low", [False, True], ids=["float32 basis", "low basis"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", DTYPES, indirect=True)
def test_count_conflicts(kind, size, low):
    """Few signs may differ: those of dots within rounding of zero."""
    s, dtype = SIZES[size], DTYPES[kind]
    grads, basis = inputs_of("projected_dots", s, dtype)
    basis = basis.to(dtype) if low else basis
    with noted(f"count_conflicts, {kind}, {size}, {'low' if low else 'float32'} basis") as note:
        got = dk.count_conflicts(grads, basis, s.p // 3)
        if RECORDING:
            return
        want = dk.count_conflicts(grads.double(), basis.double(), s.p // 3, impl="reference")
        assert torch.equal(got.valid, want.valid)
        signs = s.images * s.tokens * s.tasks * (s.tasks - 1)
        # 11 bits of float32; long sums of the tensor core, where the basis is as low as the gradients; float32 else
        share = 5e-3 if kind == "tf32" else 1e-3 if low and dtype != torch.float32 else 2e-5
        for a, b in ((got.range, want.range), (got.null, want.null)):
            note((a - b).abs().sum().item(), 2 + share * signs)


class noted:
    """Leaves a line about what happens inside: the figures that come closest to their budget, or the error."""

    def __init__(self, test):
        self.test, self.error, self.budget = test, 0.0, 1.0

    def __enter__(self):
        return self

    def __call__(self, error, budget):
        if not error / max(budget, 1e-300) <= self.error / self.budget:
            self.error, self.budget = error, max(budget, 1e-300)
        assert error <= budget, f"error {error:.3g} is over the budget {budget:.3g}"

    def __exit__(self, kind, error, trace):
        figures = {"worst": self.error, "budget": self.budget}
        message = {"error": f"{kind.__name__}: {error}"[:300]} if kind else {}
        result = "recorded" if RECORDING and not kind else kind is None
        lines.write("smoke", test=self.test, passed=result, **figures, **message)
        if kind and device_is_lost(DEVICE):
            os._exit(LOST_DEVICE)  # nothing more can run in this process: pytest-xdist starts another
