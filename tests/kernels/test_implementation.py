"""Which implementation runs inside ``dtme_kernels.implementation``: by thread, in what is composed, and compiled."""

import threading
from functools import partial

import pytest
import torch

import dtme_kernels as dk
from dtme_kernels import choice
from dtme_kernels.registry import OPERATORS
from tests.kernels.samples import DIFFERENTIABLE, SHAPES, arguments, call, gradients


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


def recorder(graphs):
    """A compiler's backend that notes the operators of this package in every graph, and runs it as it is."""

    def record(graph, inputs):
        operators = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([x for x in operators if getattr(x, "namespace", "") == "dtme"])
        return graph

    return record


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_compiled_function_is_compiled_for_what_is_chosen(name):
    torch._dynamo.reset()
    args, graphs = arguments(name), []

    compiled = torch.compile(partial(call, name), fullgraph=True, backend=recorder(graphs))
    compiled(*args)
    with dk.implementation("reference"):
        compiled(*args)
    compiled(*args)
    assert [bool(operators) for operators in graphs] == [True, False]


def test_a_context_inside_what_is_compiled():
    args, graphs = arguments("modulate", grad=False), []

    @partial(torch.compile, fullgraph=True, backend=recorder(graphs))
    def both(*args):
        with dk.implementation("reference"):
            plain = dk.modulate(*args)
        return plain, dk.modulate(*args)

    plain, kernel = both(*args)
    torch.testing.assert_close(plain, kernel)
    assert len(graphs) == 1
    assert len(graphs[0]) == 1
    assert torch.equal(plain, dk.modulate(*args, impl="reference"))


def test_contexts_that_are_entered_again_compile_nothing_again():
    torch._dynamo.reset()
    args, graphs = arguments("modulate", grad=False), []

    compiled = torch.compile(partial(call, "modulate"), fullgraph=True, backend=recorder(graphs))
    for _ in range(12):
        compiled(*args)
        with dk.implementation("reference"):
            compiled(*args)
    assert [bool(operators) for operators in graphs] == [True, False]
    with dk.implementation("reference"):  # whoever calls first while it is open: it holds for who has opened it
        torch._dynamo.reset()
        thread = threading.Thread(target=compiled, args=args)
        thread.start()
        thread.join()
        compiled(*args)
    assert [bool(operators) for operators in graphs] == [True, False, False]


def test_contexts_may_be_left_in_any_order():
    one, other = dk.implementation("reference"), dk.implementation("cpp")
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert choice.resolve("auto") == "cpp"
    other.__exit__(None, None, None)
    assert choice.resolve("auto") == "auto"


def test_a_gradient_is_taken_by_what_ran_forward():
    """Whatever is chosen where backward is called: the statistics are those of the forward's implementation."""
    args = arguments("modulate_layer_norm")
    want = gradients(call("modulate_layer_norm", *args), args)
    outputs = call("modulate_layer_norm", *args)
    with dk.implementation("triton"), Seen() as seen:
        got = gradients(outputs, args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert ("modulate_layer_norm_backward", "auto") in seen.names
