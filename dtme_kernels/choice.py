"""What ``impl="auto"`` stands for: by default what every operator finds best, and inside ``implementation`` another."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import torch_private

IMPLEMENTATIONS = ("reference", "triton", "cpp")

# {(thread, how many of its contexts are around it): the implementation}. A plain dictionary, for torch.compile cannot
# read what belongs to a thread; this it looks at, and compiles anew where it has changed
_open: dict[tuple[int, int], str] = {}


@torch_private.constant_when_compiled
def _thread() -> int:
    return threading.get_ident()


def _innermost() -> int:
    """How many contexts of this thread are around what runs; those that are left before inner ones are counted too."""
    thread = _thread()
    return max(
        [depth for other, depth in list(_open) if other == thread], default=0
    )  # a list at once: others change it


@contextmanager
def implementation(impl: str) -> Iterator[None]:
    """Let ``impl="auto"`` mean ``impl`` inside, for all operations that this thread calls, composite ones too.

    A gradient is taken by the implementation that its forward ran by. What is compiled inside, or outside and called
    inside, is compiled for it; where threads have chosen differently, for the last choice. Operators that are called by
    way of ``torch.ops.dtme`` have an ``impl`` of their own.

    Args:
        impl: ``"auto"``, ``"reference"``, which is plain torch and so can be differentiated and transformed as often,
            and in any way, that torch can; ``"triton"`` or ``"cpp"``, which raise where they cannot run.

    Raises:
        ValueError: ``impl`` is unknown.
    """
    check_impl(impl)
    key = _thread(), _innermost() + 1
    _open[key] = impl
    try:
        yield
    finally:
        del _open[key]


def resolve(impl: str) -> str:
    """``impl``, or what "auto" stands for here. Raises ValueError where it is unknown."""
    if check_impl(impl) != "auto" or not _open:
        return impl
    if torch.compiler.is_compiling():  # for whichever thread: the same contexts are open when it is looked at again
        return list(_open.values())[-1]
    depth = _innermost()
    return _open[_thread(), depth] if depth else "auto"


def check_impl(impl: str) -> str:
    """``impl`` as it is. Raises ValueError where it is unknown."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto', 'reference', 'triton' or 'cpp', got {impl!r}")
    return impl
