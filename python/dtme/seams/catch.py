"""An attention that is written out, ``softmax(query @ key.mT * scale + bias) @ value``, caught while it runs.

Under ``Catch`` a product of two batches of matrices is put off (``deferred``), until its softmax meets the values. An
attention that does something unknown to its scores still computes what it always did, but has attended no time, which
its seam refuses.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..trees import leaves, map_leaves
from .caught import Caught
from .deferred import Deferred, Maps, Scores
from .einsum import maps_and_values, queries_and_keys


class Catch(TorchFunctionMode):
    """Hands every attention under it to ``caught.attend``; torch keeps modes by thread."""

    def __init__(self, caught: Caught) -> None:
        super().__init__()
        self.caught = caught

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, caught = kwargs or {}, self.caught
        if caught.is_aside:
            return plainly(function, args, kwargs)
        if function is F.scaled_dot_product_attention:
            caught.count()
            return caught.attend(*args, **kwargs)
        if caught.replaced and function is F.linear:
            for weight, tokens in caught.replaced:
                if args[1] is weight:
                    args = (tokens, *args[1:])
        name = _name(function)
        if name == "einsum" and len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = (args[0], *args[1])
        if any(isinstance(x, Deferred) for x in (*args, *kwargs.values())):
            return carry_out(function, args, kwargs)
        if (scores := _put_off(caught, name, args, kwargs)) is not None:
            return scores
        return plainly(function, args, kwargs)


def plainly(function: Any, args: Any, kwargs: Any) -> Any:
    if function is Tensor.unflatten and torch.compiler.is_compiling():
        return torch.unflatten(*args, **kwargs)  # under a mode the method is not traced
    return function(*args, **kwargs)


def _put_off(caught: Caught, name: str, args: Any, kwargs: Any) -> Any:
    """A product that may be that of queries and keys; None for any other."""
    if name == "matmul" and len(args) == 2 and not kwargs:
        query, key = args
        is_product = query.ndim >= 3 and key.ndim >= 3 and not isinstance(key, torch.nn.Parameter)
        return Scores(caught, query, key.mT) if is_product else None
    if name == "einsum" and len(args) == 3:
        pair = queries_and_keys(*args)
        return None if pair is None else Scores(caught, *pair)
    if name == "baddbmm" and len(args) == 3 and set(kwargs) <= {"alpha", "beta"}:
        bias, query, key = args
        scores, beta = Scores(caught, query, key.mT).scaled(kwargs.get("alpha", 1)), kwargs.get("beta", 1)
        return scores.plus(bias * beta) if beta else scores
    return None


def carry_out(function: Any, args: Any, kwargs: Any) -> Any:
    """``function`` of arguments among which something is put off: remembered if it can be, else of tensors."""
    name = _name(function)
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    known = _KNOWN.get(name)
    if known is not None and args and (isinstance(args[0], Deferred) or name in _EITHER) and _are_known(kwargs):
        result = known(*args, **kwargs)
        if result is not NotImplemented:
            if isinstance(result, Deferred):
                for some in args:
                    if isinstance(some, Deferred):
                        some.check_mode()
            return result
    if args and isinstance(args[0], Deferred) and (name == "__setitem__" or (name[-1:] == "_" and name[-2:] != "__")):
        raise args[0].caught.refusal(f"changes its scores in place by {name}")
    args, kwargs = map_leaves(partial(_read, name.strip("_")), (args, kwargs))
    return plainly(function, args, kwargs)


def _are_known(kwargs: Any) -> bool:
    return not kwargs.keys() & {"out", "alpha", "rounding_mode", "other", "exponent"}


def _read(name: str, leaf: Any) -> Any:
    return leaf.read(name) if isinstance(leaf, Deferred) else leaf


def as_tensor(leaf: Any) -> Any:
    """The tensor that ``leaf`` stands for, if it stands for one."""
    return leaf.tensor() if isinstance(leaf, Deferred) else leaf


def without_deferred(tree: Any, *, poisons: bool = False) -> Any:
    """``tree`` with tensors in place of what was put off; itself if nothing was.

    Args:
        poisons: let them be NaN, by which it is seen who uses them.
    """

    def settled(leaf: Any) -> Any:
        tensor = as_tensor(leaf)
        return torch.full_like(tensor, torch.nan) if poisons and tensor is not leaf else tensor

    return map_leaves(settled, tree) if any(isinstance(leaf, Deferred) for leaf in leaves(tree)) else tree


def _name(function: Any) -> str:
    """One name for a function, the method, and the operator, in place or not."""
    name = getattr(function, "__name__", "")
    return _SAME.get(name, name)


_SAME = {
    **dict.fromkeys(("__matmul__", "__rmatmul__", "bmm"), "matmul"),
    **dict.fromkeys(("__mul__", "__rmul__", "multiply"), "mul"),
    **dict.fromkeys(("__truediv__", "truediv", "true_divide", "divide"), "div"),
    **dict.fromkeys(("__add__", "__radd__"), "add"),
    **dict.fromkeys(("__sub__", "subtract"), "sub"),
    "__rsub__": "rsub",
    **dict.fromkeys(("__rtruediv__", "__rdiv__"), "rdiv"),
    **dict.fromkeys(("__imul__", "imul", "multiply_"), "mul_"),
    **dict.fromkeys(("__itruediv__", "itruediv", "true_divide_", "divide_"), "div_"),
    **dict.fromkeys(("__iadd__", "iadd"), "add_"),
    **dict.fromkeys(("__isub__", "isub", "subtract_"), "sub_"),
}


# --- what is remembered of what is done to them -----------------------------------------------------------------------


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def change(scores: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(scores, *args, **kwargs)
        return scores.become(result) if isinstance(result, Scores) else result

    return change


def _mul(a: Any, b: Any) -> Any:
    a, b = (a, b) if isinstance(a, Deferred) else (b, a)
    return a.scaled(b) if isinstance(a, Scores) else NotImplemented


def _div(a: Any, b: Any, **kwargs: Any) -> Any:
    if not isinstance(a, Scores) or not isinstance(b, (int, float, Tensor)) or kwargs:
        return NotImplemented
    return a.scaled(1 / b)


def _add(a: Any, b: Any, **kwargs: Any) -> Any:
    a, b = (a, b) if isinstance(a, Deferred) else (b, a)
    return a.plus(b) if isinstance(a, Scores) and not kwargs else NotImplemented


def _sub(a: Any, b: Any, **kwargs: Any) -> Any:
    return a.plus(b, -1) if isinstance(a, Scores) and not kwargs else NotImplemented


def _matmul(a: Any, b: Any) -> Any:
    if torch.compiler.is_compiling() and isinstance(b, Deferred) and not isinstance(a, Deferred):
        # it hands over the operands of either product in this order; of maps, expand has refused the other one
        if not isinstance(b, Maps):
            raise b.caught.refusal("multiplies its scores by something before their softmax, which, compiled,")
        a, b = b, a
    return a.attended(b) if isinstance(a, Maps) and isinstance(b, Tensor) else NotImplemented


def _masked_fill(scores: Any, mask: Any, value: Any) -> Any:
    return scores.filled(mask, value) if isinstance(scores, Scores) else NotImplemented


def _where(mask: Any, kept: Any = None, other: Any = None) -> Any:
    if not isinstance(mask, Tensor) or not isinstance(kept, Scores) or isinstance(other, Deferred):
        return NotImplemented
    return kept.filled(~mask.bool(), other)


def _softmax(scores: Any, dim: Any = None, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    if not isinstance(scores, Scores) or dim not in (-1, len(scores.shape) - 1):
        return NotImplemented
    dtypes = [one for one in (dtype, *args) if isinstance(one, torch.dtype)]  # beside F.softmax's stack level
    return Maps(scores.copy(), dtypes[0] if dtypes else scores.dtype)


def _dropout(maps: Any, p: float = 0.5, training: bool = True, inplace: bool = False, **kwargs: Any) -> Any:
    if not training or not p:
        return maps
    if not isinstance(maps, Maps) or maps.dropout_p or inplace:
        return NotImplemented
    return Maps(maps.scores, maps.dtype, p)


def _view(some: Any, *shape: Any, **kwargs: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)):
        shape = tuple(shape[0])
    if kwargs or not all(isinstance(size, (int, torch.SymInt)) for size in shape):
        return NotImplemented
    return some.viewed(shape)


def _unflatten(some: Any, dim: int, sizes: Sequence[int]) -> Any:
    dim %= len(some.shape)
    return some.viewed((*some.shape[:dim], *sizes, *some.shape[dim + 1 :]))


def _to(some: Any, *args: Any, **kwargs: Any) -> Any:
    given = [*args, *kwargs.values()]
    return some.cast(given[0]) if len(given) == 1 and isinstance(given[0], torch.dtype) else NotImplemented


_KNOWN: dict[str, Callable[..., Any]] = {
    "mul": _mul,
    "div": _div,
    "add": _add,
    "sub": _sub,
    "rsub": lambda a, b: _sub(b, a),
    "rdiv": lambda a, b: _div(b, a),
    "mul_": _in_place(_mul),
    "div_": _in_place(_div),
    "add_": _in_place(_add),
    "sub_": _in_place(_sub),
    "matmul": _matmul,
    "einsum": maps_and_values,
    "masked_fill": _masked_fill,
    "masked_fill_": _in_place(_masked_fill),
    "where": _where,
    "softmax": _softmax,
    "dropout": _dropout,
    "view": _view,
    "reshape": _view,
    "unflatten": _unflatten,
    "to": _to,
    "float": lambda some: some.cast(torch.float32),
    "double": lambda some: some.cast(torch.float64),
    "half": lambda some: some.cast(torch.float16),
    "bfloat16": lambda some: some.cast(torch.bfloat16),
    "type_as": lambda some, other: some.cast(other.dtype),
    "contiguous": lambda some: some,
}
_EITHER = ("mul", "div", "rdiv", "add", "sub", "rsub", "matmul", "einsum", "where")
"""Functions that know what to do where what is put off is not their first argument."""


# --- methods and operators --------------------------------------------------------------------------------------------


def _from_torch(cls: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return carry_out(function, args, kwargs or {})


def _method(name: str) -> Any:
    def method(self: Deferred, *args: Any, **kwargs: Any) -> Any:
        return carry_out(getattr(Tensor, name), (self, *args), kwargs)

    return method


for _dunder in (
    *("__matmul__", "__rmatmul__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__add__", "__radd__"),
    *("__sub__", "__rsub__", "__imul__", "__itruediv__", "__iadd__", "__isub__", "__neg__", "__pow__"),
    *("__getitem__", "__setitem__", "__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__abs__", "__mod__"),
    *("__floordiv__", "__rpow__", "__invert__", "__and__", "__or__", "__xor__", "__bool__", "__float__", "__int__"),
    *("matmul", "bmm", "mul", "mul_", "multiply", "div", "div_", "divide", "add", "add_", "sub", "sub_"),
    *("masked_fill", "masked_fill_", "softmax", "view", "reshape", "unflatten", "to", "float", "double", "half"),
    *("bfloat16", "type_as", "contiguous", "clone"),
):
    setattr(Deferred, _dunder, _method(_dunder))
Deferred.__torch_function__ = classmethod(_from_torch)  # type: ignore[attr-defined]
