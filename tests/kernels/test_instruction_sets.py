"""The C++ kernels of every instruction set, against the oracles of the reference; the best one is what "auto" runs."""

import shutil

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from dtme_kernels import expanded_attention, launch, modulate, registry
from dtme_kernels.registry import OPERATORS
from dtme_kernels.testing import make
from tests.kernels import every_implementation, samples

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="Triton's interpreter takes the CPU tensors")
with_extension = pytest.mark.skipif(registry.cpp_module is None, reason="the extension is not built")


def others():
    """All but the best, or the reason to skip."""
    sets = registry.cpp_module.instruction_sets()[1:] if registry.cpp_module else []
    return sets or [pytest.param("", marks=pytest.mark.skip(reason=registry.cpp_missing or "there is only one"))]


@pytest.fixture(params=others())
def impl(request):
    best = registry.cpp_module.instruction_set()
    registry.cpp_module.use_instruction_set(request.param)
    yield "cpp"
    registry.cpp_module.use_instruction_set(best)


globals().update(every_implementation.collect())


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_extension_is_built_where_it_can_be():
    """Else nothing here, nor any "auto" on the CPU, tests the C++ kernels."""
    assert registry.cpp_module, f"{registry.cpp_missing}; `make test` builds it"
    assert {operator.automatic("cpu") for operator in OPERATORS.values()} == {"cpp", "composite"}


@with_extension
def test_a_named_extension_refuses_what_it_cannot_run():
    with pytest.raises(ValueError, match=r"one of instruction_sets\(\), got 'mmx'"):
        registry.cpp_module.use_instruction_set("mmx")
    args = make(2, 5, 6), make(3, 6), make(3, 6)
    with pytest.raises(RuntimeError, match=r"cannot run modulate: C\+\+ kernels run on CPU tensors, got meta tensors"):
        modulate(*(x.to("meta") for x in args), impl="cpp")
    q, t = make(2, 3, 5, 8), make(3, 2, 8)
    with pytest.raises(RuntimeError, match="cannot run expanded_attention: dropout is the reference's"):
        expanded_attention(q, q, q, t, t, dropout_p=0.5, impl="cpp")
    assert registry.cpp_module.num_threads() == torch.get_num_threads()


@with_extension
def test_a_named_extension_goes_through_the_dispatcher():
    tokens, weight, bias = make(2, 5, 6), make(3, 6), make(3, 6)
    negated = torch.complex(torch.zeros_like(tokens), tokens).conj().imag
    torch.testing.assert_close(modulate(negated, weight, bias, impl="cpp"), modulate(-tokens, weight, bias, impl="cpp"))
    with FakeTensorMode():
        fake = modulate(torch.empty(2, 5, 6), torch.empty(3, 6), torch.empty(3, 6), impl="cpp")
    assert isinstance(fake, FakeTensor)


@with_extension
@pytest.mark.parametrize("name", samples.SHAPES)
def test_a_named_extension_compiles_into_one_graph(name):
    torch._dynamo.reset()  # the limit of graphs is one function's, in all tests together
    args = samples.arguments(name)
    compiled = torch.compile(samples.call, fullgraph=True, backend="aot_eager")
    got, want = (function(name, *args, impl="cpp") for function in (compiled, samples.call))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(samples.gradients(outputs, args) for outputs in (got, want)))
