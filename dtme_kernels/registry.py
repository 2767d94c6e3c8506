"""The operators of ``torch.ops.dtme``: what each is made of, and how a call finds the implementation that runs it.

A public function calls its ``Operator``, and that the operator of torch, which passes, from the top,

1. ``torch.func``'s transforms: they are given the reference, which torch can transform in any way;
2. autocast: dtypes are left alone, but for attention;
3. autograd: the operator's own gradient; in forward mode the reference, likewise;
4. ``Operator._run``: the tensors are checked against the table, whoever has called; an implementation is chosen and
   run.

``impl="reference"``, in a public function, is plain torch instead: the reference itself, and torch's own gradients.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import extension, torch_private
from .choice import check_impl, resolve
from .signature import Signature

library = torch.library.Library("dtme", "DEF")
OPERATORS: dict[str, "Operator | Composition"] = {}

# what "auto" tries first, by the type of the device; what it cannot run, and all other devices, get the reference
AUTOMATIC = {"cpu": "cpp", "cuda": "triton"}

# the extension; without it, why
cpp_module: Any = None
cpp_missing: str | None = None


class Kernel(NamedTuple):
    """An implementation that is not the reference."""

    run: Callable[..., Any]
    cannot_run: Callable[..., str | None]
    """Of the arguments: why it cannot run on them, or None."""


class Gradient(NamedTuple):
    """How an operator is differentiated, once, backwards."""

    save: Callable[..., None]
    """``save(ctx, inputs, output)``: keep what the backward needs."""
    backward: Callable[..., tuple[Any, ...]]
    """``backward(ctx, *grads)``: the gradients of all inputs; ``ctx.impl`` is what the forward was asked to run by."""


class _Declared:
    """What every operator has: a schema, and a table and rules for its arguments."""

    def __init__(self, schema: str, table: Mapping[str, str], rules: Callable[..., None] | None) -> None:
        self.overload = _define(schema)
        positional = [x for x in self.overload._schema.arguments if not x.kwarg_only]
        # None for those without one
        self.defaults = tuple(x.default_value if x.has_default_value() else None for x in positional)
        optional = [x.name for x in positional if str(x.type) == "Optional[Tensor]"]
        self.signature = Signature([x.name for x in positional], optional, table)
        self.rules = rules

    def check(self, args: Sequence[Any]) -> str:
        """Raise what is wrong with the arguments, or return what kind of tensors they are, as ``Signature.check``."""
        kind = self.signature.check(args)
        if self.rules:
            self.rules(*args)
        return kind

    def complete(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The dispatcher leaves out the last arguments where they have their default value."""
        return args if len(args) == len(self.defaults) else (*args, *self.defaults[len(args) :])


class Operator(_Declared):
    """One operator of torch.

    Args:
        schema: as ``torch.library.Library.define`` takes it, but for ``impl``, which every operator has.
        table: what its tensors must be, as ``signature`` says.
        reference: plain torch, the definition; on every device.
        fake: shapes, dtypes and strides of the outputs.
        triton: the kernel for CUDA tensors.
        cpp: the file of ``csrc`` with the kernel for CPU tensors, which the extension brings along.
        rules: of all arguments: raises where what the table cannot say is wrong.
        prepare: of all arguments: what a kernel is given in their place.
        gradient: without one, its outputs are integers or it has none.
        public: the name of the public function, where the operator returns more than it does; else its own.
        low_precision: under autocast, cast the arguments as ``scaled_dot_product_attention`` has them cast. All other
            operators leave dtypes alone: sums of squares and signs of dot products do not survive bfloat16.
    """

    def __init__(
        self,
        schema: str,
        table: Mapping[str, str],
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        triton: Kernel | None = None,
        cpp: str | None = None,
        rules: Callable[..., None] | None = None,
        prepare: Callable[..., tuple[Any, ...]] | None = None,
        gradient: Gradient | None = None,
        public: str | None = None,
        low_precision: bool = False,
    ) -> None:
        super().__init__(schema, table, rules)
        self.operator = schema.partition("(")[0]
        self.name = public or self.operator
        self.reference, self.fake, self.cpp, self.prepare = reference, fake, cpp, prepare
        self.gradient, self.low_precision = gradient, low_precision
        self.kernels: dict[str, Kernel] = {} if triton is None or find_spec("triton") is None else {"triton": triton}
        self.writes = self.overload._schema.is_mutable
        OPERATORS[self.name] = self

        library.impl(self.operator, self._run_called, "BackendSelect")  # the last one before a device's own
        torch.library.register_fake(f"dtme::{self.operator}", self._run_fake, lib=library)
        if gradient:
            library.impl(self.operator, self._differentiate, "Autograd", with_keyset=True)
        for device in ("cpu", "cuda"):
            library.impl(self.operator, self._leave_autocast(device), f"Autocast{device.upper()}")
        library.impl(self.operator, self._transform, "FuncTorchDynamicLayerFrontMode")

    def __call__(self, impl: str, *args: Any) -> Any:
        """What a public function does: run by ``impl``, or by what ``implementation`` has put in the place of auto."""
        impl = resolve(impl)
        if impl == "reference":
            return self.run_reference(*args)
        if impl != "auto" and (why := self.missing(impl)):
            raise RuntimeError(f"impl={impl!r} cannot run {self.name}: {why}")
        return self.overload(*args) if impl == "auto" else self.overload(*args, impl=impl)

    def run_reference(self, *args: Any, **options: Any) -> Any:
        """Plain torch, outside of autocast, which would reach the matrix products inside."""
        device = args[0].device.type
        if not autocast_enabled(device):
            self.check(args)
            return self.reference(*args, **options)
        with torch.autocast(device, enabled=False):
            return self.run_reference(*self._cast(device, args), **options)

    def backward_of(self, ctx: Any, *args: Any) -> Any:
        """The gradient of what has run, by the same implementation, whichever is chosen where backward is called."""
        return self.run_reference(*args) if ctx.impl == "reference" else self.overload(*args, impl=ctx.impl)

    def missing(self, impl: str) -> str | None:
        """Why ``impl`` cannot run here, whatever it is given, or None where it can."""
        if impl == "reference" or impl in self.kernels:
            return None
        if impl == "triton" and find_spec("triton") is None:
            return "Triton is not installed (on Linux it comes with a CUDA build of torch)"
        if impl == "cpp" and cpp_missing:
            return cpp_missing
        return f"this version has no {'Triton' if impl == 'triton' else 'C++'} kernel for it"

    def automatic(self, device: str) -> str:
        """What ``impl="auto"`` runs on ``"cpu"`` or ``"cuda"``."""
        return AUTOMATIC[device] if AUTOMATIC[device] in self.kernels else "reference"

    # --- what the dispatcher of torch calls, from the top ------------------------------------------------------------

    def _transform(self, *args: Any, impl: str = "auto") -> Any:
        """Inside ``torch.func``'s transforms, and in forward mode."""
        if check_impl(impl) not in ("auto", "reference"):
            raise RuntimeError(
                f"impl={impl!r} cannot run {self.name} in forward mode or inside a transform of torch.func:"
                " impl='reference' can, and 'auto' takes it there"
            )
        return self.run_reference(*self.complete(args))

    def _leave_autocast(self, device: str) -> Callable[..., Any]:
        def run(*args: Any, impl: str = "auto") -> Any:
            with torch.autocast(device, enabled=False):
                return self.overload(*self._cast(device, args), impl=impl)

        return run

    def _differentiate(self, keys: Any, *args: Any, impl: str = "auto") -> Any:
        if torch_private.in_transform() or torch_private.have_tangents(args):
            return self._transform(*args, impl=impl)
        if not torch_private.any_requires_grad(*args):
            return self._below_autograd(keys, args, impl)
        if torch.is_grad_enabled():
            return _Function.apply(self, keys, impl, *args)
        with torch_private.without_autograd():
            return self._below_autograd(keys, args, impl)

    def _below_autograd(self, keys: Any, args: tuple[Any, ...], impl: str) -> Any:
        if torch_private.is_next_to_run(keys):
            return self._run(args, impl)
        return self.overload.redispatch(keys & torch_private.BELOW_AUTOGRAD, *args, impl=impl)

    def _run_called(self, *args: Any, impl: str = "auto") -> Any:
        """By the dispatcher: of a call that autograd has not seen, or that a mode has made."""
        return self._run(args, impl)

    def _run(self, args: tuple[Any, ...], impl: str) -> Any:
        args = self.complete(args)
        kind = self.check(args)
        if kind == "meta" and impl == "auto":
            return self.fake(*args)
        kernel = self._kernel_for(impl, kind, args)
        if kernel is None:
            output = self.reference(*args)
        else:
            output = kernel.run(*(self.prepare(*args) if self.prepare else args))
        if self.writes and not args[0].is_inference():  # autograd does not see by itself that something was written
            torch.autograd.graph.increment_version(args[0])
        return output

    def _kernel_for(self, impl: str, kind: str, args: Sequence[Any]) -> Kernel | None:
        """None for the reference; ``kind`` as ``Signature.check`` returns it."""
        if impl == "auto":
            kernel = self.kernels.get(AUTOMATIC.get(kind, ""))
            return None if kernel is None or kernel.cannot_run(*args) else kernel
        if check_impl(impl) == "reference":
            return None
        why = self.missing(impl) or self.kernels[impl].cannot_run(*args)
        if why or kind.startswith("torch."):
            why = why or f"the kernels take strided tensors, got {kind}"
            raise RuntimeError(f"impl={impl!r} cannot run {self.name}: {why}")
        return self.kernels[impl]

    def _run_cpp(self, *args: Any) -> Any:
        """What ``csrc/library.cpp`` has registered."""
        return self.overload.redispatch(torch_private.CPU, *args)

    def _run_fake(self, *args: Any, impl: str = "auto") -> Any:
        check_impl(impl)
        args = self.complete(args)
        self.check(args)
        return self.fake(*args)

    # --- their parts -------------------------------------------------------------------------------------------------

    def _cast(self, device: str, args: Sequence[Any]) -> Sequence[Any]:
        """Autocast's own rule: every floating-point tensor but float64."""
        if not self.low_precision:
            return args
        dtype = torch.get_autocast_dtype(device)
        low = (isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 for x in args)
        return [x.to(dtype) if cast else x for x, cast in zip(args, low, strict=True)]

    def find_cpp(self) -> None:
        """Whether the extension has brought the kernel along: it registers it with the dispatcher itself."""
        if self.cpp and torch_private.has_kernel(f"dtme::{self.operator}", "CPU"):
            self.kernels["cpp"] = Kernel(self._run_cpp, off_cpu)


class Composition(_Declared):
    """An operator that is made of others, and of plain torch between them: autograd, autocast and all see its parts.

    Args:
        schema, table, rules: as of an ``Operator``.
        reference: plain torch all of it.
        function: ``function(impl, *args)`` calls the others by ``impl``.
        outputs: how many of what the two return the operator does; a public function may return them all.
    """

    def __init__(
        self,
        schema: str,
        table: Mapping[str, str],
        *,
        reference: Callable[..., tuple[Any, ...]],
        function: Callable[..., tuple[Any, ...]],
        outputs: int,
        rules: Callable[..., None] | None = None,
    ) -> None:
        super().__init__(schema, table, rules)
        self.name = schema.partition("(")[0]
        self.reference, self.function = reference, function
        OPERATORS[self.name] = self

        def run(*args: Any, impl: str = "auto") -> tuple[Any, ...]:
            return self(impl, *self.complete(args))[:outputs]

        _compose(self.name, run)

    def __call__(self, impl: str, *args: Any) -> tuple[Any, ...]:
        impl = resolve(impl)
        self.check(args)
        return self.reference(*args) if impl == "reference" else self.function(impl, *args)

    def missing(self, impl: str) -> None:
        """Why ``impl`` cannot run: its parts say."""

    def automatic(self, device: str) -> str:
        return "composite"


def without_last_output(schema: str, operator: Operator) -> None:
    """Define the public operator of one that has an output more, the last, which is for its backward alone."""
    _define(schema)

    def run(*args: Any, impl: str = "auto") -> Any:
        *outputs, _ = operator.overload(*args, impl=impl)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    _compose(schema.partition("(")[0], run)


def _define(schema: str) -> Any:
    """The operator of the schema, which is given the argument ``impl`` that all have."""
    arguments, _, returns = schema.rpartition(") -> ")
    library.define(f"{arguments}, *, str impl='auto') -> {returns}")
    return getattr(torch.ops.dtme, schema.partition("(")[0]).default


def _compose(operator: str, function: Callable[..., Any]) -> None:
    """Let an operator be nothing but what ``function`` calls, to all of torch."""
    for key in ("CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode"):
        library.impl(operator, function, key)


class _Function(torch.autograd.Function):
    """Run an operator below autograd, and record its gradient."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, keys: Any, impl: str, *args: Any) -> Any:
        assert operator.gradient
        ctx.operator, ctx.impl = operator, impl
        with torch_private.without_autograd():
            output = operator._below_autograd(keys, args, impl)
        args = operator.complete(args)
        # not by a kernel, which may want of the forward what the reference does not leave
        if operator._kernel_for(impl, operator.signature.check(args), args) is None:
            ctx.impl = "reference"
        operator.gradient.save(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, None, *ctx.operator.gradient.backward(ctx, *grads)


def differentiable_once(public: str) -> Gradient:
    """Of the operators that are a gradient themselves."""

    def refuse(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            f"dtme::{public} is differentiable once; impl='reference', or `with dtme_kernels.implementation("
            "'reference')`, as often as torch is"
        )

    return Gradient(lambda ctx, inputs, output: None, refuse)


# --- the extension, devices, autocast --------------------------------------------------------------------------------


def load_extension() -> None:
    """Once all operators are defined: look which of them have C++ kernels here."""
    global cpp_module, cpp_missing
    cpp_module, cpp_missing = extension.load()
    for operator in OPERATORS.values():
        if isinstance(operator, Operator):
            operator.find_cpp()


def off_cpu(*args: Any) -> str | None:
    """Why C++ kernels cannot run on these arguments."""
    return None if args[0].is_cpu else f"C++ kernels run on CPU tensors, got {args[0].device.type} tensors"


# asked once: not every torch can trace the question
_HAVE_AUTOCAST = {device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)}


def autocast_enabled(device: str) -> bool:
    """Of a device type; ``"meta"`` and the like have none."""
    return device in _HAVE_AUTOCAST and torch.is_autocast_enabled(device)
