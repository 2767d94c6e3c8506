"""What this package uses of torch that torch does not promise to keep: each name once, and what it is for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.autograd import forward_ad

# keysets, of a call that goes on below. What counts the versions of tensors in place is left out too: registry does it
BELOW_AUTOGRAD = torch._C._after_ADInplaceOrView_keyset
_ABOVE_RUN = BELOW_AUTOGRAD.raw_repr() & ~(
    torch._C._dispatch_keyset_full_after(DispatchKey.BackendSelect).raw_repr()
    | torch._C.DispatchKeySet(DispatchKey.BackendSelect).raw_repr()
)
CPU = torch._C.DispatchKeySet(DispatchKey.CPU)

any_requires_grad = torch._C._any_requires_grad
without_autograd = torch._C._AutoDispatchBelowAutograd

# whether one tensor is a view of the other, or both of a third
are_views_of_one = torch._C._is_alias_of  # type: ignore[attr-defined]


def is_next_to_run(keys: torch._C.DispatchKeySet) -> bool:
    """Of a call that autograd has seen: whether nobody else, as a mode, wants to see it before ``Operator._run``."""
    return not keys.raw_repr() & _ABOVE_RUN


def in_forward_mode() -> bool:
    """Whether tensors may have tangents: some thread is inside ``torch.autograd.forward_ad.dual_level``."""
    return forward_ad._current_level >= 0


def have_tangents(args: Sequence[Any]) -> bool:
    """Whether one of these tensors has, or one of a list among them."""
    if not in_forward_mode():
        return False
    every = [y for x in args for y in (x if isinstance(x, list | tuple) else (x,))]
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in every)


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is running."""
    return torch._C._are_functorch_transforms_active()


def has_kernel(name: str, key: str) -> bool:
    """Whether somebody has registered one with the dispatcher."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def constant_when_compiled(function: Callable[[], int]) -> Callable[[], int]:
    """``torch.compiler.assume_constant_result``, which imports the compiler, two seconds, to set this mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
