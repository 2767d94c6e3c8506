"""The operators of ``torch.ops.dtme``: one library, and one table of implementations read by ``impl=`` and by info."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import extension
from .launch import cannot_run

library = torch.library.Library("dtme", "DEF")

# The reference answers on every device; a kernel overrides it under its own key, and a missing one is a missing key.
DISPATCH_KEYS = {"reference": "CompositeExplicitAutograd", "triton": "CUDA", "cpp": "CPU"}
OPERATORS: dict[str, "Operator"] = {}
# the extension; without it, why
cpp_module: Any = None
cpp_missing: str | None = None


class Operator:
    """One operator: its schema, its implementations, and what ``impl=`` may ask for.

    Args:
        schema: as ``torch.library.Library.define`` takes it.
        reference: plain torch, the definition.
        fake: shapes, dtypes and strides of the outputs.
        composite: plain torch that calls other operators by the ``impl`` it is given first. It then is what all but
            ``impl="reference"`` runs; autograd, fake tensors and autocast see its parts, and ``fake`` is not wanted.
        public: the name of the public function, where the operator returns more than it does; else its own.
        low_precision: under autocast, cast the arguments as ``scaled_dot_product_attention`` has them cast. All other
            operators leave dtypes alone: sums of squares and signs of dot products do not survive bfloat16.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any] | None = None,
        *,
        composite: Callable[..., Any] | None = None,
        public: str | None = None,
        low_precision: bool = False,
    ) -> None:
        self.operator = schema.partition("(")[0]
        self.name = public or self.operator
        self.low_precision = low_precision
        self.composite = composite
        self.implementations: dict[str, Callable[..., Any]] = {}
        self.gradient: tuple[Callable[..., None], Callable[..., Any], Operator] | None = None
        self.unsupported: dict[str, Callable[..., str | None]] = {"triton": cannot_run, "cpp": off_cpu}
        library.define(schema)
        self.overload = getattr(torch.ops.dtme, self.operator).default
        if composite:
            library.impl(self.operator, partial(composite, "auto"), "CompositeImplicitAutograd")
            self.implementations["reference"] = reference
        else:
            self.implement("reference", reference)
            torch.library.register_fake(f"dtme::{self.operator}", fake, lib=library)
            for device in ("cpu", "cuda"):
                library.impl(self.operator, self._autocast_kernel(device), f"Autocast{device.upper()}")
        OPERATORS[self.name] = self

    def implement(self, impl: str, function: Callable[..., Any]) -> None:
        """Let the dispatcher, and ``impl=``, have ``function``."""
        library.impl(self.operator, function, DISPATCH_KEYS[impl])
        self.implementations[impl] = function

    def implement_triton(self, module: str, unsupported: Callable[..., str | None]) -> None:
        """Give CUDA tensors to the function of this name in ``module``, which is imported, with Triton, when one comes.

        Args:
            module: full name.
            unsupported: of the arguments: why the kernel cannot run on them, or None. The dispatcher then runs the
                reference, and ``impl="triton"`` raises.
        """
        name = self.name

        def kernel(*args: Any) -> Any:
            return getattr(import_module(module), name)(*args)

        if find_spec("triton") is not None:
            self.implement("triton", self.dispatch_triton)
            self.implementations["triton"], self.unsupported["triton"] = kernel, unsupported

    def dispatch_triton(self, *args: Any) -> Any:
        """What the dispatcher runs on CUDA tensors; it leaves out the last arguments that have their default value."""
        args = (*args, *(x.default_value for x in self.overload._schema.arguments[len(args) :]))
        impl = "reference" if self.unsupported["triton"](*args) else "triton"
        return self.implementations[impl](*args)

    def find_cpp(self) -> None:
        """Let ``impl="cpp"`` have the kernel that the extension has registered under the CPU key, if it has one."""
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"dtme::{self.operator}", DISPATCH_KEYS["cpp"]):
            self.implementations["cpp"] = self.overload

    def differentiate(self, setup: Callable[..., None], backward: Callable[..., Any], once: "Operator") -> None:
        """Register the gradient.

        Args:
            setup: saves in ``ctx`` what the backward needs, of inputs and output.
            backward: ``backward(call, ctx, *grads)`` returns the gradients of the inputs, by one ``call``.
            once: the operator that this call is, in the implementation of the forward. It has no gradient of its own.
        """

        def refuse(ctx: Any, *grads: Tensor) -> None:
            raise RuntimeError(f"dtme::{self.name} is differentiable once; impl='reference' as often as torch is")

        self.gradient = setup, backward, once
        torch.library.register_autograd(
            f"dtme::{self.operator}", partial(backward, once.overload), setup_context=setup, lib=library
        )
        torch.library.register_autograd(f"dtme::{once.operator}", refuse, lib=library)

    def missing(self, impl: str) -> str | None:
        """Why ``impl`` cannot run here, or None where it can."""
        if impl not in DISPATCH_KEYS:
            raise ValueError(f"impl must be 'auto', 'reference', 'triton' or 'cpp', got {impl!r}")
        if impl in self.implementations or self.composite:
            return None  # of a composition, its parts say
        if impl == "triton" and find_spec("triton") is None:
            return "Triton is not installed (on Linux it comes with a CUDA build of torch)"
        if impl == "cpp" and cpp_missing:
            return cpp_missing
        return f"this version has no {'Triton' if impl == 'triton' else 'C++'} kernel for it"

    def automatic(self, device: str) -> str:
        """What ``impl="auto"`` runs on ``"cpu"`` or ``"cuda"``."""
        kernel = {"cpu": "cpp", "cuda": "triton"}[device]
        return "composite" if self.composite else kernel if kernel in self.implementations else "reference"

    def __call__(self, impl: str, *args: Any) -> Any:
        """Run the named implementation on ``args``, the first of them a tensor; only ``auto`` may choose."""
        if impl == "auto":
            return self.overload(*args)
        if why := self.missing(impl):
            raise RuntimeError(f"impl={impl!r} cannot run {self.name}: {why}")
        if self.composite:
            return self.implementations["reference"](*args) if impl == "reference" else self.composite(impl, *args)
        if impl in self.unsupported and (why := self.unsupported[impl](*args)):
            raise RuntimeError(f"impl={impl!r} cannot run {self.name}: {why}")
        function = self.implementations[impl]
        if impl == "cpp":
            return function(*args)  # what the dispatcher always has for CPU tensors
        if impl == "triton" and self.gradient:
            function = partial(_Named.apply, self, impl)  # the reference is plain torch, with torch's own gradient
        return self._outside_autocast(function, args[0].device.type, args)

    def _autocast_kernel(self, device: str) -> Callable[..., Any]:
        return lambda *args: self._outside_autocast(self.overload, device, args)

    def _outside_autocast(self, function: Callable[..., Any], device: str, args: tuple[Any, ...]) -> Any:
        """Otherwise autocast would reach the matrix products inside ``function``."""
        if not autocast_enabled(device):
            return function(*args)
        if self.low_precision:
            dtype = torch.get_autocast_dtype(device)
            args = tuple(_cast(x, dtype) for x in args)
        with torch.autocast(device, enabled=False):
            return function(*args)


class _Named(torch.autograd.Function):
    """A named implementation, forward and backward, past the dispatcher."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, impl: str, *args: Any) -> Any:
        assert operator.gradient
        setup, _, _ = operator.gradient
        ctx.operator, ctx.impl = operator, impl
        ctx.needed = ctx.needs_input_grad[2:]
        output = operator.implementations[impl](*args)
        setup(ctx, args, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _, backward, once = ctx.operator.gradient
        found = backward(partial(once, ctx.impl), ctx, *grads)
        return None, None, *(found if isinstance(found, tuple) else (found,))


def load_extension() -> None:
    """Once all operators are defined: look which of them have C++ kernels here."""
    global cpp_module, cpp_missing
    cpp_module, cpp_missing = extension.load()
    for operator in OPERATORS.values():
        operator.find_cpp()


def off_cpu(*args: Any) -> str | None:
    """Why C++ kernels cannot run on these arguments."""
    device = next(x.device.type for x in args if isinstance(x, Tensor))
    return None if device == "cpu" else f"C++ kernels run on CPU tensors, got {device} tensors"


# asked once: not every torch can trace the question
_HAVE_AUTOCAST = {device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)}


def autocast_enabled(device: str) -> bool:
    """Of a device type; ``"meta"`` and the like have none."""
    return device in _HAVE_AUTOCAST and torch.is_autocast_enabled(device)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """Autocast's own rule: every floating-point tensor but float64."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
