"""What torch asks of an operator: schema, fake tensors, autograd, autocast, one graph for every batch size."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import dtme_kernels as dk
from dtme_kernels.registry import OPERATORS, Kernel, Operator
from dtme_kernels.testing import make
from tests.kernels.samples import NUMBERS, RANK, SAMPLES, SHAPES, P, T, arguments, call, gradients

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    for args in SAMPLES[name]:
        torch.library.opcheck(OPERATORS[name].overload, tuple(args))


def test_every_kernel_is_in_the_file_that_its_operator_names():
    """For a reader who comes from ``op.py``; no editor follows a name from Python to C++."""
    registered = (CSRC / "library.cpp").read_text()
    for operator in OPERATORS.values():
        if isinstance(operator, Operator):
            assert (CSRC / operator.cpp).exists()
            assert f'm.impl("{operator.operator}"' in registered


@pytest.mark.parametrize(("name", "impl"), [*((name, "auto") for name in SHAPES), ("expanded_attention", "reference")])
def test_one_graph_for_every_batch_size(name, impl):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (8, 9, 13):
        args = arguments(name, batch, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=batch != 8):
            got = compiled(name, *args, impl=impl)
        want = call(name, *args)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradients(got, args), gradients(want, args))


@pytest.mark.parametrize("name", [name for name in SHAPES if "attention" in name or "modulate" in name])
def test_one_graph_for_every_task_set(name):
    """Tasks are streams, and their number is a size like any other."""
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_streams in (3, 4, 2):
        shapes = [tuple(num_streams if n == T else n for n in shape) for shape in SHAPES[name](7)]
        args = [make(*shape, seed=s, requires_grad=True) for s, shape in enumerate(shapes)] + NUMBERS.get(name, [])
        with torch._dynamo.config.patch(error_on_recompile=num_streams != 3):
            got = compiled(name, *args)
        want = call(name, *args)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradients(got, args), gradients(want, args))


def test_inductor_runs_everything_in_one_graph():
    def everything(*args):
        attended, modulated = call("modulate_concat_attention", *args)
        covariance = dk.token_covariance(modulated)
        return attended, covariance, *dk.projected_dots(modulated, covariance, RANK)

    args = arguments("modulate_concat_attention", dtype=torch.float64)
    got, want = torch.compile(everything, fullgraph=True)(*args), everything(*args)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, args), gradients(want, args))


def test_accumulation_compiles():
    accumulator, layers = torch.zeros(2, P, P, dtype=torch.float64), [make(2, 5, P), make(2, 3, P, seed=1)]
    torch.compile(dk.token_covariance_, fullgraph=True, backend="aot_eager")(accumulator, layers)
    torch.testing.assert_close(accumulator, torch.stack([dk.token_covariance(x) for x in layers]).double())


def autocast(active=True):
    return torch.autocast("cpu", torch.bfloat16) if active else nullcontext()


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"expanded_attention", "modulate_concat_attention"}))
def test_autocast_leaves_float32_alone(name, impl):
    args = arguments(name)
    want = call(name, *args, impl=impl)
    with autocast():
        got = call(name, *args, impl=impl)
    # the backward operators are called under autocast too; plain autograd's matrix products would follow it
    with autocast(impl == "auto"):
        got_grads = gradients(got, args)
    for a, b in zip([*got, *got_grads], [*want, *gradients(want, args)], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_autocast_leaves_accumulators_alone(impl):
    tokens, accumulator = make(20, P), torch.zeros(P, P)
    with autocast():
        dk.token_covariance_(accumulator, tokens, impl=impl)
    assert torch.equal(accumulator, dk.token_covariance(tokens, impl=impl))


def test_autocast_lowers_attention_and_its_mask(impl):
    args = [*arguments("expanded_attention"), make(5, 5, seed=5, requires_grad=True)]
    low = [x.detach().bfloat16().requires_grad_() for x in args]
    want = dk.expanded_attention(*low[:5], attn_mask=low[5], impl=impl)
    with autocast():
        got = dk.expanded_attention(*args[:5], attn_mask=args[5], impl=impl)
    with autocast(impl == "auto"):
        got_grads = gradients([got], args)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    for a, b in zip(got_grads, gradients([want], low), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_autocast_takes_mixed_dtypes_in_a_block(impl):
    args = arguments("modulate_concat_attention")
    args[6] = args[6].detach().bfloat16()  # qkv_weight
    with autocast():
        attended, modulated = call("modulate_concat_attention", *args, impl=impl)
    assert attended.dtype == torch.bfloat16
    assert modulated.dtype == torch.float32


@pytest.mark.parametrize("name", ["token_covariance", "projected_dots", "modulate_layer_norm", "expanded_attention"])
def test_second_derivative_is_refused_not_wrong(name):
    args = arguments(name, dtype=torch.float64)

    def penalty(impl):
        loss = sum(out.square().sum() for out in call(name, *args, impl=impl))
        (grad,) = torch.autograd.grad(loss, args[0], create_graph=True)
        return grad.square().sum()

    with pytest.raises(RuntimeError, match="differentiable once"):
        penalty("auto").backward()
    with sdpa_kernel(SDPBackend.MATH):  # the others are differentiable once themselves
        penalty("reference").backward()
    assert args[0].grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(set(dk.__all__) & OPERATORS.keys()))
def test_a_named_implementation_never_falls_back(name):
    operator = OPERATORS[name]
    for impl in ("triton", "cpp"):
        if operator.missing(impl):
            with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run {name}: "):
                operator(impl, *SAMPLES[name][0])
    with pytest.raises(ValueError, match="got 'cuda'"):
        operator("cuda", *SAMPLES[name][0])


def test_import_touches_no_device_and_info_says_what_runs():
    script = (
        "import dtme_kernels, sys, torch; assert not torch.cuda.is_initialized();"
        "assert not {'triton', 'torch._dynamo'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    info = subprocess.run([sys.executable, "-m", "dtme_kernels.info"], check=True, capture_output=True, text=True)
    lines = info.stdout.splitlines()
    assert lines[0] == f"dtme_kernels {dk.__version__}"
    for name in set(dk.__all__) & OPERATORS.keys():
        (row,) = (line.split() for line in lines if line.startswith(f"{name} "))
        assert row[1] == OPERATORS[name].automatic("cpu")
        assert row[2] == OPERATORS[name].automatic("cuda")
        for reason in filter(None, map(OPERATORS[name].missing, ("triton", "cpp"))):
            assert reason in info.stdout


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if isinstance(operator, Operator)])
def test_a_kernel_is_given_the_defaults(name, monkeypatch):
    """The dispatcher leaves out the last arguments that have their default value; implementations want all."""
    operator, given = OPERATORS[name], []
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in SAMPLES[name][0]]
    kernel = Kernel(lambda *args: given.append(args) or operator.reference(*args), lambda *args: None)
    monkeypatch.setitem(operator.kernels, "cpp", kernel)
    operator.overload(*args)
    arguments = [x for x in operator.overload._schema.arguments if not x.kwarg_only]
    assert len(given[0]) == len(arguments)
    for value, argument in list(zip(given[0], arguments, strict=True))[len(args) :]:
        assert value == argument.default_value
