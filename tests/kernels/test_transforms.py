"""Derivatives in every way torch has: forward mode, torch.func, any order; and which implementation runs there."""

import threading
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import dtme_kernels as dk
from dtme_kernels.registry import OPERATORS, Operator
from dtme_kernels.testing import make
from tests.kernels.samples import DIFFERENTIABLE, NUMBERS, SAMPLES, SHAPES, arguments, call


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


# --- implementation --------------------------------------------------------------------------------------------------


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators of this package that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dtme":
            self.names.add((function._opname, (kwargs or {}).get("impl", "auto")))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_is_plain_torch(name):
    args = arguments(name)
    with Seen() as seen, dk.implementation("reference"):
        got = call(name, *args)
    assert not seen.names
    for a, b in zip(got, call(name, *args, impl="reference"), strict=True):
        assert torch.equal(a, b)
    with Seen() as seen:
        call(name, *args)
    assert seen.names


def test_an_implementation_is_chosen_in_this_thread_only_and_inner_ones_win():
    args, seen = arguments("modulate_concat_attention", grad=False), []

    def run(**options):
        with Seen() as inside:
            call("modulate_concat_attention", *args, **options)
        seen.append({impl for _, impl in inside.names})

    with dk.implementation("reference"):
        run()
        with dk.implementation("auto"):
            run()
        run(impl="auto")
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        with pytest.raises(KeyError), dk.implementation("auto"):
            raise KeyError
        run()
    run()
    assert seen == [set(), {"auto"}, set(), {"auto"}, set(), {"auto"}]
    with pytest.raises(ValueError, match=r"impl must be .*, got 'fast'"), dk.implementation("fast"):
        pass


def test_an_implementation_reaches_what_is_composed_and_never_falls_back():
    missing = [impl for impl in ("cpp", "triton") if OPERATORS["modulate"].missing(impl)]
    for impl in ("cpp", "triton"):
        args = arguments("modulate_concat_attention", grad=False)
        with dk.implementation(impl):
            if impl in missing or impl == "triton":
                with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run modulate_layer_norm: "):
                    call("modulate_concat_attention", *args)
            else:
                with Seen() as seen:
                    call("modulate_concat_attention", *args)
                assert {impl for _, impl in seen.names} == {"cpp"}
            assert dk.split_token_space(torch.eye(3)).rank == 2  # the same everywhere


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_compiled_function_is_compiled_for_what_is_chosen(name):
    torch._dynamo.reset()
    args, graphs = arguments(name), []

    def record(graph, inputs):
        operators = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append(any(getattr(operator, "namespace", "") == "dtme" for operator in operators))
        return graph

    compiled = torch.compile(partial(call, name), fullgraph=True, backend=record)
    compiled(*args)
    with dk.implementation("reference"):
        compiled(*args)
    compiled(*args)
    assert graphs == [True, False]


# --- what every raw operator is told of its tensors ------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if isinstance(operator, Operator)])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_another_dtype_is_refused_or_right(name, impl):
    """One argument at a time; what is right equals the same numbers in float64."""
    operator = OPERATORS[name]
    run = partial(operator.overload, impl=impl)
    for args in SAMPLES[name]:
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        if torch.bfloat16 in [x.dtype for x in args if isinstance(x, torch.Tensor)]:
            continue  # float32 has as many ways to be mixed
        for i, x in enumerate(args):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                continue
            for dtype in {torch.float64, torch.float16, torch.bfloat16, torch.complex64} - {x.dtype}:
                mixed = [*args[:i], x.to(dtype), *args[i + 1 :]]
                copies = [y.clone() if isinstance(y, torch.Tensor) else y for y in mixed]
                try:
                    got = run(*copies)
                except (TypeError, ValueError):
                    continue
                assert dtype != torch.complex64
                wide = [y.double() if isinstance(y, torch.Tensor) and y.is_floating_point() else y for y in mixed]
                wide = [[y.double() for y in x] if isinstance(x, list) else x for x in wide]
                want = operator.overload(*wide, impl="reference")
                got, want = (copies[0], wide[0]) if got is None else (got, want)
                for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
                    if a.shape == b.shape and b.isfinite().all():  # not the statistics
                        torch.testing.assert_close(a.double(), b.double(), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("p", [3, 64, 300])
def test_tokens_may_be_views_of_the_accumulator(impl, p):
    for views in (lambda a: [a[1].mT, a[0, 2:]], lambda a: [torch.ones(1, p), a[0]], lambda a: [a, a]):
        accumulator = make(2, p, p)
        want = accumulator + torch.stack([dk.token_covariance(x.clone()) for x in views(accumulator)])
        dk.token_covariance_(accumulator, views(accumulator), impl=impl)
        torch.testing.assert_close(accumulator, want, rtol=1e-4, atol=1e-3)


def test_an_accumulator_that_overlaps_itself_is_refused():
    memory = torch.zeros(100)
    for strides in ((1, 1), (2, 1), (0, 1), (4, 2)):
        with pytest.raises(ValueError, match="accumulator must not overlap itself"):
            dk.token_covariance_(memory.as_strided((3, 3), strides), make(4, 3))
    dk.token_covariance_(memory.as_strided((3, 3), (1, 5)), make(4, 3))
    torch.testing.assert_close(memory.as_strided((3, 3), (1, 5)), dk.token_covariance(make(4, 3)))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_absurd_sizes_are_refused(impl):
    z, n = torch.zeros(1), 2**31
    far, none = z.expand(1, 1, 1, 2**42, 2**20), z.expand(1, 1, 0, 2**20)
    calls = {
        "basis": lambda: dk.count_conflicts(z.expand(2, 1, n), z.expand(n, n), 1, impl=impl),
        "grads": lambda: dk.projected_dots(z.expand(2, 0, n, n), z.expand(n, n), 1, impl=impl),
        "key": lambda: dk.expanded_attention(far[..., :1, :], far, far, none, none, impl=impl),
        "tokens": lambda: dk.modulate(z.expand(0, n, n), z.expand(1, n), z.expand(1, n), impl=impl),
    }
    for name, run in calls.items():
        with pytest.raises(ValueError, match=rf"{name} must have at most 2\*\*48 elements"):
            run()


def test_a_query_that_overlaps_itself():
    """Torch's own attention for the CPU leaves part of its output as memory was."""
    query = make(1, 1, 1, 4, 8).expand(2, 3, 2, 4, 8)
    key, value, task = make(2, 3, 2, 4, 8, seed=1), make(2, 3, 2, 4, 8, seed=2), make(2, 2, 1, 8, seed=3)
    want = dk.expanded_attention(query.contiguous(), key, value, task, task)
    for impl in ("auto", "reference"):
        torch.testing.assert_close(dk.expanded_attention(query, key, value, task, task, impl=impl), want)


def test_a_space_of_the_largest_numbers():
    for size in (1.5e308, 1e-308, 5e-324):
        space = dk.split_token_space(torch.eye(3, dtype=torch.float64) * size, ratio=3)
        assert space.rank == 2
        torch.testing.assert_close(space.eigenvalues, torch.full((3,), size, dtype=torch.float64), rtol=0, atol=0)
        assert torch.equal(space.basis.abs().sum(0), torch.ones(3, dtype=torch.float64))
