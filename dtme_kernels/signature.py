"""What the tensors of an operator must be: one table beside its schema, read before any implementation runs.

A row is what one tensor's sizes are called, and, behind a semicolon, which dtypes it may have::

    "[T] B N p>=1"          an optional first dimension; every name is one size, the same wherever it stands
    "... p"                 any dimensions in front
    "K *tokens p"           any dimensions in front, the same wherever the name stands
    "3p pairs(K)"           sizes that follow from others, of rows further up: 3 p, K (K - 1) / 2
    "2 T B N; float32"      a number; one dtype, or several with ``or`` between them
    "T p; like weight"      the dtype of another argument
    "p p; sums of tokens"   the dtype in which that argument's numbers are summed up: float64, or else float32

Where nothing is said, any of float16, bfloat16, float32 and float64 will do. A row named ``tokens[]`` is for every
tensor of the list ``tokens``. All tensors are on one device.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# elements, with sizes of 0 taken for 1: more than any machine has room or time for, and few enough that no product of
# sizes and bytes comes near 64 bits
MOST_ELEMENTS = 2**48

# of a tensor: all that the table speaks of
Facts = tuple[torch.Size, torch.dtype, torch.device, torch.layout]
Sizes = dict[str, Any]


class Row:
    """One argument's row."""

    def __init__(self, name: str, row: str) -> None:
        self.name = name.removesuffix("[]")
        self.is_list = name.endswith("[]")
        sizes, _, dtype = (part.strip() for part in row.partition(";"))
        dims = sizes.split()
        self.optional = dims.pop(0)[1:-1] if dims and dims[0].startswith("[") else ""
        several = [i for i, dim in enumerate(dims) if dim == "..." or dim.startswith("*")]
        self.several = several[0] if several else None
        self.dims = [_Dim(dim) for dim in dims]
        self.like = dtype.removeprefix("like ") if dtype.startswith("like ") else ""
        self.sums_of = dtype.removeprefix("sums of ") if dtype.startswith("sums of ") else ""
        named = dtype and not (self.like or self.sums_of)
        kinds = dtype.split(" or ") if named else ["floating"]
        self.dtypes = tuple(t for k in kinds for t in (FLOATING if k == "floating" else (getattr(torch, k),)))

    def bind(self, shape: Sequence[int], sizes: Sizes) -> bool:
        """Whether the shape fits; the sizes that are met for the first time are bound to their names."""
        dims = self.dims
        if self.optional:
            if f"[{self.optional}]" not in sizes and len(shape) not in (len(dims), len(dims) + 1):
                return False
            present = sizes.setdefault(f"[{self.optional}]", len(shape) == len(dims) + 1)
            dims = [_Dim(self.optional), *dims] if present else dims
        if self.several is not None:
            end = len(shape) - (len(dims) - self.several - 1)
            middle, name = tuple(shape[self.several : end]), dims[self.several].text
            if end < self.several or (name != "..." and sizes.setdefault(name, middle) != middle):
                return False
            dims = dims[: self.several] + dims[self.several + 1 :]
            shape = (*shape[: self.several], *shape[end:])
        return len(shape) == len(dims) and all(dim.bind(n, sizes) for dim, n in zip(dims, shape, strict=True))

    def expected(self, shape: Sequence[int], sizes: Sizes) -> str:
        """``(T, p) = (4, 192)`` where only the numbers are wrong, or ``(B, N, p) or (T, B, N, p) with p >= 1``."""
        forms = [self.dims, [_Dim(self.optional), *self.dims]] if self.optional else [self.dims]
        if self.optional and f"[{self.optional}]" in sizes:
            forms = [forms[sizes[f"[{self.optional}]"]]]
        text = " or ".join(_tuple([dim.shown for dim in form]) for form in forms)
        values = filled = [dim.value(sizes) for dim in forms[0]]
        if len(shape) == len(values) and self.several is None:  # what is not bound yet may be as it is
            filled = [n if known is None else known for n, known in zip(shape, values, strict=True)]
        fits = all(n is not None and n >= dim.least for n, dim in zip(filled, forms[0], strict=True))
        if len(forms) == 1 and fits:
            return f"{text} = {_tuple([str(n) for n in filled])}"
        known = [f"{dim.text} = {n}" for dim, n in zip(forms[0], values, strict=True) if isinstance(n, int)]
        least = [f"{d.text} >= {d.least}" for d, n in zip(forms[0], values, strict=True) if d.least and n is None]
        return text + (f" with {' and '.join(dict.fromkeys(known + least))}" if known + least else "")


class _Dim:
    """One size of a row: a name, a number, or what follows from a named one; or ``...`` and ``*name`` of several."""

    def __init__(self, text: str) -> None:
        named = re.fullmatch(r"([A-Za-z]\w*)(?:>=(\d+))?", text)
        times = re.fullmatch(r"(\d+)([A-Za-z]\w*)?", text)
        pairs = re.fullmatch(r"pairs\((\w+)\)", text)
        self.text = named[1] if named else text
        self.shown = "..." if text.startswith("*") else self.text
        self.least = int(named[2] or 0) if named else 0
        self.times = int(times[1]) if times else 0
        self.of: str | None = times[2] if times else None
        self.pairs_of = pairs[1] if pairs else None

    def value(self, sizes: Sizes) -> Any:
        """What it must be, or None where that is not known yet."""
        if self.times and self.of is None:
            return self.times
        n = sizes.get(self.of or self.pairs_of or self.text)
        if n is None:
            return None
        return self.times * n if self.times else n * (n - 1) // 2 if self.pairs_of else n

    def bind(self, n: int, sizes: Sizes) -> bool:
        if not (self.times or self.pairs_of):
            sizes.setdefault(self.text, n)
        return bool(n >= self.least and n == self.value(sizes))


class Signature:
    """The table of one operator.

    Args:
        names: of the operator's arguments, in the order of its schema.
        optional: those that may be None.
        table: {argument: row} for every tensor and list of tensors. A row may use sizes of the rows above it.
    """

    def __init__(self, names: Sequence[str], optional: Sequence[str], table: Mapping[str, str]) -> None:
        self.optional = optional
        rows = [Row(name, row) for name, row in table.items()]
        # which arguments are tensors or lists of them, and where among these every row's is
        self.tensors = sorted(names.index(row.name) for row in rows)
        self.rows = [(self.tensors.index(names.index(row.name)), row) for row in rows]
        # where they come first, their facts are taken without a look at what is a list or None
        all_plain = not any(row.is_list or row.name in optional for row in rows)
        self.plain = len(rows) if all_plain and self.tensors == list(range(len(rows))) else 0
        self._remembered = lru_cache(maxsize=1024)(self._check)

    def check(self, args: Sequence[Any]) -> str:
        """Raise what is wrong with the tensors among ``args``, an operator's, in full.

        What was right once is not looked at again.

        Returns:
            The type of their device, or the layout of one that is not strided, ``"torch.sparse_coo"``.

        Raises:
            TypeError: a tensor has another dtype.
            ValueError: a size, the number of dimensions or the device does not match, or a tensor is absurdly large.
        """
        if torch.compiler.is_compiling():
            return self._check(self._facts(args))
        try:
            plain = self.plain
            facts = (
                tuple([(x.shape, x.dtype, x.device, x.layout) for x in args[:plain]]) if plain else self._facts(args)
            )
            return self._remembered(facts)
        except AttributeError:  # None, which torch lets pass for a tensor
            return self._check(self._facts(args))
        except TypeError:  # a wrong dtype; or sizes that are symbols, which nothing can be remembered by
            return self._check(facts)

    def _facts(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Of every tensor, of every one of a list, or None, in the order of the arguments."""
        return tuple([_facts(args[i]) for i in self.tensors])

    def _check(self, facts: tuple[Any, ...]) -> str:
        sizes: Sizes = {}
        seen: dict[str, Facts] = {}
        for i, row in self.rows:
            fact = facts[i]
            if row.is_list:
                for d, each in enumerate(fact):
                    _check_tensor(row, f"{row.name}[{d}]" if len(fact) > 1 else row.name, each, sizes, seen)
            elif fact is not None or row.name not in self.optional:
                _check_tensor(row, row.name, fact, sizes, seen)
        _, _, device, _ = next(iter(seen.values()))
        others = [str(layout) for _, _, _, layout in seen.values() if layout != torch.strided]
        return others[0] if others else device.type


def _facts(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device, x.layout
    return None if x is None else tuple([_facts(y) for y in x])


def _check_tensor(row: Row, name: str, fact: Facts | None, sizes: Sizes, seen: dict[str, Facts]) -> None:
    if fact is None:
        raise TypeError(f"{name} must be a tensor, got None")
    shape, dtype, device, _ = fact
    first, (_, _, first_device, _) = next(iter(seen.items()), (name, fact))
    if dtype not in row.dtypes:
        raise TypeError(f"{name} must be {_or(row.dtypes)}, got {dtype}")
    if row.like and dtype != seen[row.like][1]:
        raise TypeError(f"{name} must be {seen[row.like][1]} like {row.like}, got {dtype}")
    if row.sums_of and dtype != (wide := torch.promote_types(seen[row.sums_of][1], torch.float32)):
        raise TypeError(f"{name} must be {wide} for {row.sums_of} of {seen[row.sums_of][1]}, got {dtype}")
    if device != first_device:
        raise ValueError(f"{name} must be on {first_device} like {first}, got {device}")
    known = dict(sizes)
    if not row.bind(shape, sizes):
        raise ValueError(f"{name} must be {row.expected(shape, known)}, got {tuple(shape)}")
    if all(isinstance(n, int) for n in shape) and prod([max(n, 1) for n in shape]) > MOST_ELEMENTS:
        raise ValueError(f"{name} must have at most 2**48 elements, sizes of 0 taken for 1, got {tuple(shape)}")
    seen[name] = fact


def _or(dtypes: Sequence[torch.dtype]) -> str:
    if set(dtypes) == {torch.bool, *FLOATING}:
        return "bool or floating point"
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} or {last}" if others else last


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' * (len(items) == 1)})"
