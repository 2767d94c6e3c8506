"""Derivatives in every way torch has: forward mode, torch.func, any order."""

import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import dtme_kernels as dk
from dtme_kernels.registry import OPERATORS
from dtme_kernels.testing import make
from tests.kernels.samples import DIFFERENTIABLE, NUMBERS, arguments, call


def problem(name):
    """The function of its tensors alone, and float64 tensors."""
    tensors = [x.detach() for x in arguments(name, dtype=torch.float64) if isinstance(x, torch.Tensor)]
    return lambda *args, **options: call(name, *args, *NUMBERS.get(name, []), **options), tensors


def loss_of(function, **options):
    return lambda *args: sum(out.sin().sum() for out in function(*args, **options))


def raw(name):
    """The operator of torch.ops of the same name."""
    outputs = lambda *args: getattr(torch.ops.dtme, name)(*args, *NUMBERS.get(name, []))  # noqa: E731
    return lambda *args: x if isinstance(x := outputs(*args), tuple) else (x,)


def gradients(function, tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(loss_of(function)(*leaves), leaves)


def close(got, want):
    torch.testing.assert_close(list(got), list(want), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_the_transpose_of_the_backward(name):
    """<tangents of the outputs, u> = <tangents, gradients for u>, by torch.func and by dual numbers, also raw."""
    function, tensors = problem(name)
    tangents = [make(*x.shape, dtype=torch.float64, seed=9 + i) for i, x in enumerate(tensors)]
    leaves = [x.clone().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    weights = [make(*x.shape, dtype=torch.float64, seed=30 + i) for i, x in enumerate(outputs)]
    backward = torch.autograd.grad(outputs, leaves, weights)
    want = sum((t * g).sum() for t, g in zip(tangents, backward, strict=True))
    for way in (function, raw(name)):
        _, moved = jvp(way, tuple(tensors), tuple(tangents))
        torch.testing.assert_close(sum((w * m).sum() for w, m in zip(weights, moved, strict=True)), want)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents, strict=True)]
            moved = [forward_ad.unpack_dual(out).tangent for out in way(*duals)]
        torch.testing.assert_close(sum((w * m).sum() for w, m in zip(weights, moved, strict=True)), want)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func_equals_autograd(name):
    function, tensors = problem(name)
    want, every = gradients(function, tensors), tuple(range(len(tensors)))
    for way in (function, raw(name)):
        close(grad(loss_of(way), every)(*tensors), want)
        _, pull = vjp(loss_of(way), *tensors)
        close(pull(torch.ones((), dtype=torch.float64)), want)
        moved = [torch.stack([x, 2 * x]) for x in tensors]
        doubled = gradients(function, [2 * x for x in tensors])
        close(vmap(grad(loss_of(way), every))(*moved), map(torch.stack, zip(want, doubled, strict=True)))
        close(
            vmap(way)(*moved),
            map(torch.stack, zip(function(*tensors), function(*(2 * x for x in tensors)), strict=True)),
        )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_by_torch_func_and_by_the_reference(name):
    function, (first, *others) = problem(name)
    second = hessian(lambda x: loss_of(function)(x, *others))(first)
    close([second], [jacrev(jacfwd(lambda x: loss_of(function)(x, *others)))(first)])
    leaf = first.clone().requires_grad_()
    with dk.implementation("reference"):
        (once,) = torch.autograd.grad(loss_of(function)(leaf, *others), leaf, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), leaf)
    close([second.flatten(first.dim()).reshape(first.numel(), -1).sum(0).view_as(first)], [twice])


def test_counts_have_no_tangent_and_can_be_mapped():
    grads, basis = (x.detach() for x in arguments("count_conflicts")[:2])
    want = [call("count_conflicts", g, basis, 2)[0] for g in (grads, -grads.flip(1))]
    pairs = torch.stack([grads, -grads.flip(1)])
    assert torch.equal(vmap(lambda g: call("count_conflicts", g, basis, 2)[0])(pairs), torch.stack(want))
    count = lambda g: call("count_conflicts", g, basis, 2)[0].double()  # noqa: E731
    out, tangent = jvp(count, (grads,), (torch.ones_like(grads),))
    assert torch.equal(out, want[0].double())
    assert not tangent.any()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_a_named_kernel_says_what_to_do_instead(name, impl):
    function, tensors = problem(name)
    operator = OPERATORS[name]
    if operator.missing(impl) or (name == "modulate_concat_attention" and OPERATORS["modulate"].missing(impl)):
        pytest.skip("there is none here")
    with pytest.raises(
        RuntimeError, match=rf"impl='{impl}' cannot run \w+ in forward mode or inside.*impl='reference'"
    ):
        grad(loss_of(function, impl=impl))(*tensors)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="impl='reference' can, and 'auto' takes it"):
        function(forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:], impl=impl)


@pytest.mark.parametrize("name", ["token_covariance", "expanded_attention"])
def test_autocast_means_the_same_inside_a_transform(name):
    """Attention is lowered, nothing else is: a matrix product inside the reference must not follow autocast."""
    function, tensors = problem(name)
    tensors = [x.float() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        (want,) = function(*tensors)
        got, _ = jvp(lambda *args: function(*args)[0], tuple(tensors), tuple(tensors))
    assert got.dtype == want.dtype == (torch.bfloat16 if name == "expanded_attention" else torch.float32)
    torch.testing.assert_close(got, want)


def test_dual_numbers_of_another_thread_are_not_ours():
    inside, done = threading.Event(), threading.Event()

    def other():
        with forward_ad.dual_level():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    try:
        tokens = make(3, 4, requires_grad=True)
        assert "_Function" in str(dk.token_covariance(tokens).grad_fn)
    finally:
        done.set()
        thread.join()
