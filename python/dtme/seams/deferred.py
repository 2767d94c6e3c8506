"""An attention that is written out, ``softmax(query @ key.mT * scale + bias) @ value``, caught while it runs.

Under ``Catch`` a product of two batches of matrices is put off. What comes in its place (``Scores``) remembers what is
then done to it, as far as that is a scale, a bias or a mask; its softmax (``Maps``) waits as well; and the product of
that with the values hands query, key, value, mask, dropout and scale to whoever attends, as a call of
``scaled_dot_product_attention`` does. Whatever else is asked of either is asked of the tensor that it stands for, which
is then computed. So an attention that does something unknown to its scores still computes what it always did, but has
attended no time, which its seam refuses.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..trees import map_leaves
from .base import Attend, NotExpandable

Factor = float | Tensor


class Caught:
    """What is known of one run of an attention: an object of its own, as torch.compile sees nothing on a mode.

    Args:
        attend: as ``scaled_dot_product_attention``; with None for the value it returns the weights of the keys.
        rows: of the tokens that are attended to: where heads are folded into the batch, the rest is heads.
        block: its name, for messages.
        replaced: (weight, tokens) for linear layers that are to read other tokens than they are given.
    """

    def __init__(self, attend: Attend, rows: int, block: str, replaced: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.attend, self.rows, self.block, self.replaced = attend, rows, block, replaced
        self.num_calls = 0
        self.is_aside = False
        """Whether what was put off is being computed, whose products are not to be put off again."""

    def refusal(self, what: str) -> NotExpandable:
        return NotExpandable(f"block {self.block!r}: its attention {what}, which task tokens do not support")


class Catch(TorchFunctionMode):
    """Hands every attention under it to ``caught.attend``; torch keeps modes by thread."""

    def __init__(self, caught: Caught) -> None:
        super().__init__()
        self.caught = caught

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, caught = kwargs or {}, self.caught
        if caught.is_aside:
            return function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            caught.num_calls += 1
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
        if name == "unflatten" and torch.compiler.is_compiling():
            return torch.unflatten(*args, **kwargs)  # under a mode the method is not traced
        return function(*args, **kwargs)


def _put_off(caught: Caught, name: str, args: Any, kwargs: Any) -> Any:
    """A product that may be that of queries and keys; None for any other."""
    if name == "matmul" and len(args) == 2 and not kwargs:
        query, key = args
        return Scores(caught, query, key.mT) if query.ndim >= 3 and key.ndim >= 3 else None
    if name == "einsum" and len(args) == 3:
        pair = _queries_and_keys(*args)
        return None if pair is None else Scores(caught, *pair)
    if name == "baddbmm" and len(args) == 3 and set(kwargs) <= {"alpha", "beta"}:
        bias, query, key = args
        scores, beta = Scores(caught, query, key.mT).scaled(kwargs.get("alpha", 1)), kwargs.get("beta", 1)
        return scores.plus(bias * beta) if beta else scores
    return None


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


class _Aside:
    def __init__(self, caught: Caught) -> None:
        self.caught, self.before = caught, caught.is_aside

    def __enter__(self) -> None:
        self.caught.is_aside = True

    def __exit__(self, *error: object) -> None:
        self.caught.is_aside = self.before


class Deferred:
    """A tensor that is computed where something needs it as one."""

    caught: Caught
    shape: torch.Size
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carry_out(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]


def _method(name: str) -> Any:
    def method(self: Deferred, *args: Any, **kwargs: Any) -> Any:
        return carry_out(getattr(Tensor, name), (self, *args), kwargs)

    return method


for _dunder in (
    *("__matmul__", "__rmatmul__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__add__", "__radd__"),
    *("__sub__", "__rsub__", "__imul__", "__itruediv__", "__iadd__", "__isub__", "__neg__", "__pow__"),
    *("__getitem__", "__setitem__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("matmul", "bmm", "mul", "mul_", "multiply", "div", "div_", "divide", "add", "add_", "sub", "sub_"),
    *("masked_fill", "masked_fill_", "softmax", "view", "reshape", "unflatten", "to", "float", "double", "half"),
    *("bfloat16", "type_as", "contiguous", "clone"),
):
    setattr(Deferred, _dunder, _method(_dunder))


def carry_out(function: Any, args: Any, kwargs: Any) -> Any:
    """``function`` of arguments among which something is put off: remembered if it can be, else of tensors."""
    name = _name(function)
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    known = _KNOWN.get(name)
    if known is not None and args and (isinstance(args[0], Deferred) or name in _EITHER):
        result = known(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if isinstance(args[0], Deferred) and (name == "__setitem__" or (name[-1:] == "_" and name[-2:] != "__")):
        raise args[0].caught.refusal(f"changes its scores in place by {name}")
    args, kwargs = map_leaves(_as_tensor, (args, kwargs))
    return function(*args, **kwargs)


def _as_tensor(leaf: Any) -> Any:
    return leaf.tensor() if isinstance(leaf, Deferred) else leaf


def _version(tensor: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


class Scores(Deferred):
    """``query @ key.mT * factor + bias``, of queries (..., N, d) and keys (..., M, d)."""

    def __init__(self, caught: Caught, query: Tensor, key: Tensor) -> None:
        self.caught, self.query, self.key = caught, query, key
        self.factor: Factor = 1.0
        self.bias: Tensor | None = None
        """(..., N or 1, M), of the shared keys alone."""
        self.shift: Factor | None = None
        """(..., N or 1, 1), of all keys: the softmax does not change by it."""
        self.base = torch.Size(
            (*torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]), query.shape[-2], key.shape[-2])
        )
        self.shape, self.dtype = self.base, query.dtype
        self.has_gradient = torch.is_grad_enabled()
        self._computed: tuple[Tensor, int] | None = None

    def _copy(self) -> "Scores":
        other = Scores(self.caught, self.query, self.key)
        other.factor, other.bias, other.shift = self.factor, self.bias, self.shift
        other.shape, other.dtype, other.has_gradient = self.shape, self.dtype, self.has_gradient
        return other

    def _take(self, other: "Scores") -> "Scores":
        """Become ``other``: an operation in place."""
        self.factor, self.bias, self.shift, self._computed = other.factor, other.bias, other.shift, None
        return self

    def tensor(self) -> Tensor:
        if self._computed is None:
            with _Aside(self.caught):
                scores = self.query @ self.key.mT * self.factor
                for term in (self.bias, self.shift):
                    scores = scores if term is None else scores + term
                scores = scores.view(self.shape).to(self.dtype)
            self._computed = scores, _version(scores)
        return self._computed[0]

    def _base(self, tensor: Tensor) -> Tensor | None:
        """``tensor``, which meets scores of the present shape, so that it meets them as they were made."""
        last = tensor.shape[-1]
        if self.shape == self.base:
            return tensor[(None,) * (len(self.base) - tensor.ndim)] if tensor.ndim <= len(self.base) else None
        if tensor.ndim > len(self.shape):
            return None
        return tensor.expand(*self.shape[:-1], last).reshape(*self.base[:-1], last)

    def scaled(self, by: Any) -> Any:
        if isinstance(by, Tensor) and by.ndim:
            if by.shape[-1] != 1 or (by := self._base(by)) is None:
                return NotImplemented
        elif not isinstance(by, (int, float, Tensor)):
            return NotImplemented
        other = self._copy()
        other.factor = self.factor * by
        other.bias = None if self.bias is None else self.bias * by
        other.shift = None if self.shift is None else self.shift * by
        return other

    def plus(self, term: Any, sign: int = 1) -> Any:
        other = self._copy()
        if isinstance(term, (int, float)) or (isinstance(term, Tensor) and not term.ndim):
            other.shift = sign * term + (0.0 if self.shift is None else self.shift)
            return other
        if not isinstance(term, Tensor) or (term := self._base(term)) is None:
            return NotImplemented
        term = term if sign == 1 else -term
        if term.shape[-1] == 1 != self.base[-1]:
            other.shift = term if self.shift is None else self.shift + term
        elif term.shape[-1] == 1 and self._computed is not None:
            return NotImplemented  # of one key, a bias may also be a shift by the scores' own maximum
        else:
            other.bias = term if self.bias is None else self.bias + term
        return other

    def filled(self, mask: Any, value: Any) -> Any:
        if not isinstance(mask, Tensor) or not mask.ndim or (isinstance(value, Tensor) and value.ndim):
            return NotImplemented
        if (mask := self._base(mask)) is None:
            return NotImplemented
        other = self._copy()
        mask = mask.expand(*mask.shape[:-1], self.base[-1]).bool()
        bias = torch.zeros((), dtype=self.dtype, device=mask.device) if self.bias is None else self.bias
        value = torch.as_tensor(value, dtype=bias.dtype, device=mask.device)
        other.bias = torch.where(mask, value, bias)
        return other

    def viewed(self, shape: Sequence[int]) -> Any:
        """Another view of the leading axes; queries and keys stay the last two."""
        if -1 in shape:
            known = math.prod(size for size in shape if size != -1)
            shape = [math.prod(self.shape) // max(known, 1) if size == -1 else size for size in shape]
        if len(shape) < 3 or tuple(shape[-2:]) != tuple(self.base[-2:]) or math.prod(shape) != math.prod(self.base):
            return NotImplemented
        other = self._copy()
        other.shape = torch.Size(shape)
        return other

    def cast(self, dtype: torch.dtype) -> "Scores":
        if dtype == self.dtype:
            return self
        other = self._copy()
        other.dtype = dtype
        return other

    def attended(self, value: Tensor | None, dropout_p: float = 0.0) -> Tensor:
        """What ``attend`` makes of the queries, keys and ``value`` (..., M, d); of None the weights (..., N, M)."""
        self._check()
        query, scale = (self.query, float(self.factor)) if isinstance(self.factor, (int, float)) else (None, 1.0)
        query = self.query * self.factor if query is None else query
        parts = [query, self.key] if value is None else [query, self.key, value]
        dtype = query.dtype
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        parts = [self._by_row(part).to(dtype) for part in parts]
        bias = None if self.bias is None else self._bias_by_row(self.bias).to(dtype)
        with _Aside(self.caught):
            if value is None:
                return self.caught.attend(*parts, None, attn_mask=bias, scale=scale).reshape(self.shape)
            self.caught.num_calls += 1
            out = self.caught.attend(*parts, attn_mask=bias, dropout_p=dropout_p, scale=scale)
        return out.reshape(*self.shape[:-1], value.shape[-1]).to(value.dtype)

    def _check(self) -> None:
        if torch.is_grad_enabled() and not self.has_gradient:
            raise self.caught.refusal("computes its scores without gradients and attends with them")
        if self._computed is not None and _version(self._computed[0]) != self._computed[1]:
            raise self.caught.refusal("writes into its scores")

    def _by_row(self, tensor: Tensor) -> Tensor:
        """(..., N, d) as (rows, H, N, d)."""
        if tensor.ndim == 3:
            return tensor.unflatten(0, (self.caught.rows, -1))
        return tensor if tensor.ndim == 4 else tensor.flatten(0, -4)

    def _bias_by_row(self, bias: Tensor) -> Tensor:
        if bias.ndim == 3:
            return bias.unsqueeze(0) if bias.shape[0] == 1 else bias.unflatten(0, (self.caught.rows, -1))
        if bias.ndim == 4:
            return bias
        if all(size == 1 for size in bias.shape[:-3]):
            return bias.reshape(1, *bias.shape[-3:])
        return bias.expand(*self.base[:-3], *bias.shape[-3:]).flatten(0, -4)


class Maps(Deferred):
    """The softmax of ``scores`` over the keys, perhaps with dropout."""

    def __init__(self, scores: Scores, dtype: torch.dtype, dropout_p: float = 0.0) -> None:
        self.scores, self.caught, self.dropout_p = scores, scores.caught, dropout_p
        self.shape, self.dtype = scores.shape, dtype
        self._computed: Tensor | None = None

    def tensor(self) -> Tensor:
        """(..., N, M): the weights of the shared keys, which with those of task keys sum to 1."""
        if self._computed is None:
            weights = self.scores.attended(None).to(self.dtype)
            self._computed = F.dropout(weights, self.dropout_p) if self.dropout_p else weights
        return self._computed

    def viewed(self, shape: Sequence[int]) -> Any:
        scores = self.scores.viewed(shape)
        return scores if scores is NotImplemented else Maps(scores, self.dtype, self.dropout_p)

    def cast(self, dtype: torch.dtype) -> "Maps":
        return self if dtype == self.dtype else Maps(self.scores, dtype, self.dropout_p)

    def attended(self, value: Tensor) -> Tensor:
        if self.shape != self.scores.base:
            raise self.caught.refusal("rearranges its weights before it takes them to its values")
        return self.scores.attended(value, self.dropout_p)


# --- what is remembered of what is done to them -----------------------------------------------------------------------


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def change(scores: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(scores, *args, **kwargs)
        return scores._take(result) if isinstance(result, Scores) else result

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
    if isinstance(b, Maps) and not isinstance(a, Deferred) and torch.compiler.is_compiling():
        a, b = b, a  # it hands over the operands of both products in this order; expand has refused the other one
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
    return Maps(scores, dtypes[0] if dtypes else scores.dtype)


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


# --- products that are written as an Einstein sum ---------------------------------------------------------------------


def _labels(equation: str, ranks: Sequence[int]) -> tuple[str, str, str] | None:
    """The axes of two operands and of their product, one letter each; None where one has an axis twice."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow or len(names) != 2:
        return None
    counts = {rank - len(name) + 3 for name, rank in zip(names, ranks, strict=True) if "..." in name}
    if len(counts) > 1:
        return None
    filler = "".join(chr(0x3B1 + i) for i in range(next(iter(counts), 0)))
    first, second, output = (name.replace("...", filler) for name in (*names, output))
    twice = any(len(set(name)) != len(name) for name in (first, second, output))
    return None if twice else (first, second, output)


def _queries_and_keys(equation: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | None:
    """(..., N, d) and (..., M, d) whose scores (..., N, M) the sum is; None if it is something else."""
    labels = _labels(equation, (first.ndim, second.ndim))
    if labels is None or len(labels[2]) < 3:
        return None
    a, b, out = labels
    lead, query, key = out[:-2], out[-2], out[-1]
    if query not in a:
        a, b, first, second = b, a, second, first
    summed = set(a) & set(b) - set(out)
    if len(summed) != 1 or sorted(a) != sorted(lead + query + "".join(summed)):
        return None
    if sorted(b) != sorted(lead + key + "".join(summed)):
        return None
    channel = summed.pop()
    order = [a.index(x) for x in lead + query + channel]
    return first.permute(order), second.permute([b.index(x) for x in lead + key + channel])


def _einsum_of_maps(equation: Any, *operands: Any) -> Any:
    """The sum of maps (..., N, M) and values, if it is their product."""
    if len(operands) != 2:
        return NotImplemented
    first, second = operands
    maps, value = (first, second) if isinstance(first, Maps) else (second, first)
    if not isinstance(maps, Maps) or not isinstance(value, Tensor):
        return NotImplemented
    labels = _labels(equation, (len(first.shape), len(second.shape)))
    if labels is None:
        return NotImplemented
    a, b, out = labels if maps is first else (labels[1], labels[0], labels[2])
    lead, query, key = a[:-2], a[-2], a[-1]
    channels = set(out) - set(a)
    if len(channels) != 1 or sorted(b) != sorted(lead + key + "".join(channels)) or key in out:
        return NotImplemented
    channel = channels.pop()
    attended = maps.attended(value.permute([b.index(x) for x in lead + key + channel]))
    names = lead + query + channel
    return attended.permute([names.index(x) for x in out])


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
    "einsum": _einsum_of_maps,
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
    "clone": lambda some: some._copy() if isinstance(some, Scores) else NotImplemented,
}
_EITHER = ("mul", "div", "rdiv", "add", "sub", "rsub", "matmul", "einsum", "where")
"""Functions that know what to do where what is put off is not their first argument."""
