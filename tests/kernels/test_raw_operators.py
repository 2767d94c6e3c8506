"""What the operators of ``torch.ops.dtme`` make of arguments that no public function would give them."""

from functools import partial

import pytest
import torch

import dtme_kernels as dk
from dtme_kernels.registry import OPERATORS, Operator
from dtme_kernels.testing import make
from tests.kernels.samples import SAMPLES


def wrong(args):
    """The arguments with one tensor at a time a row shorter or longer, a dimension less, or of integers.

    And all of them without what there are n of.
    """
    for n in range(1, 7):
        without = ([slice(size * (size != n)) for size in getattr(x, "shape", ())] for x in args)
        yield [x[kept] if isinstance(x, torch.Tensor) else x for x, kept in zip(args, map(tuple, without), strict=True)]
    for i, x in enumerate(args):
        if isinstance(x, list):
            yield from ([*args[:i], values, *args[i + 1 :]] for values in wrong(x))
        if not isinstance(x, torch.Tensor):
            continue
        changed = [x.long(), *x[:1]]
        for dim in range(x.dim()):
            changed += [x.narrow(dim, 0, x.shape[dim] - 1)] if x.shape[dim] else []
            changed += [torch.cat([x, x.narrow(dim, 0, 1)], dim)] if x.shape[dim] else []
        yield from ([*args[:i], y, *args[i + 1 :]] for y in changed)


def outcome(function, args):
    """What is returned, or written into the first argument; None if it raises."""
    args = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    try:
        outputs = function(*args)
    except (RuntimeError, TypeError, IndexError, ValueError, ZeroDivisionError):
        return None
    return [args[0]] if outputs is None else outputs if isinstance(outputs, tuple) else [outputs]


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if isinstance(operator, Operator)])
def test_wrong_sizes_are_refused_below_the_public_functions_too(name):
    operator = OPERATORS[name]
    for args in SAMPLES[name]:
        for changed in wrong([x.detach() if isinstance(x, torch.Tensor) else x for x in args]):
            got = outcome(operator.overload, changed)
            if got is not None:
                want = outcome(partial(operator.overload, impl="reference"), changed)
                assert want is not None, [getattr(x, "shape", x) for x in changed]
                if operator.name in ("expanded_attention", "packed_attention", "modulate_layer_norm"):
                    *got, _ = got  # the statistics, which the reference has not
                    *want, _ = want
                torch.testing.assert_close(list(got), list(want), rtol=1e-2, atol=1e-2, equal_nan=True)


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
