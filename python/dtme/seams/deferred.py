"""Scores and weights of an attention that is written out, put off until it is known what they are for.

``Scores`` stands for ``query @ key.mT`` and remembers what is then done to it, as far as that is a scale, a bias or a
mask. Its softmax, ``Maps``, waits as well; and the product of that with the values hands query, key, value, mask,
dropout and scale to whoever attends, as a call of ``scaled_dot_product_attention`` does. Whatever else is asked of
either is asked of the tensor that it stands for, which is then computed (``catch``).
"""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
        self.unknown: list[str] = []
        """What was done to scores or weights that needed them as tensors."""
        self.made: list[weakref.ref[Deferred]] = []

    def kept(self) -> "list[Deferred]":
        """What is still held by somebody."""
        return [some for reference in self.made if (some := reference()) is not None]

    def refusal(self, what: str) -> NotExpandable:
        return NotExpandable(f"block {self.block!r}: its attention {what}, which task tokens do not support")


class _Aside:
    def __init__(self, caught: Caught) -> None:
        self.caught, self.before = caught, caught.is_aside

    def __enter__(self) -> None:
        self.caught.is_aside = True

    def __exit__(self, *error: object) -> None:
        self.caught.is_aside = self.before


class Deferred:
    """A tensor that is computed where something needs it as one."""

    shape: torch.Size
    dtype: torch.dtype

    def __init__(self, caught: Caught) -> None:
        self.caught = caught
        if not torch.compiler.is_compiling():
            caught.made.append(weakref.ref(self))

    def tensor(self) -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.caught.unknown.append(name)
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


def _version(tensor: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


class Scores(Deferred):
    """``query @ key.mT * factor + bias``, of queries (..., N, d) and keys (..., M, d)."""

    def __init__(self, caught: Caught, query: Tensor, key: Tensor) -> None:
        super().__init__(caught)
        self.query, self.key = query, key
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
        self._changes = 0
        """How often it was changed in place."""
        self._origin: tuple[Scores, int] | None = None
        """What it is a view of, and how often that had been changed."""

    def copy(self) -> "Scores":
        other = Scores(self.caught, self.query, self.key)
        other.factor, other.bias, other.shift = self.factor, self.bias, self.shift
        other.shape, other.dtype, other.has_gradient = self.shape, self.dtype, self.has_gradient
        return other

    def become(self, other: "Scores") -> "Scores":
        """Become ``other``: an operation in place."""
        self._check()
        self.factor, self.bias, self.shift, self._computed = other.factor, other.bias, other.shift, None
        self._changes += 1
        if self._origin is not None:  # would change as well: whoever uses it now is told
            self._origin[0]._changes, self._origin = -1, None
        return self

    def tensor(self) -> Tensor:
        self._check()
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
        other = self.copy()
        other.factor = self.factor * by
        other.bias = None if self.bias is None else self.bias * by
        other.shift = None if self.shift is None else self.shift * by
        return other

    def plus(self, term: Any, sign: int = 1) -> Any:
        other = self.copy()
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
        other = self.copy()
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
        other = self.copy()
        other.shape = torch.Size(shape)
        other._origin = self, self._changes
        return other

    def cast(self, dtype: torch.dtype) -> "Scores":
        if dtype == self.dtype:
            return self
        other = self.copy()
        other.dtype = dtype
        return other

    def attended(self, value: Tensor | None, dropout_p: float = 0.0) -> Tensor:
        """What ``attend`` makes of the queries, keys and ``value`` (..., M, d); of None the weights (..., N, M)."""
        self._check()
        if torch.is_grad_enabled() and not self.has_gradient:
            raise self.caught.refusal("computes its scores without gradients and attends with them")
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
        if self._computed is not None and _version(self._computed[0]) != self._computed[1]:
            raise self.caught.refusal("writes into its scores")
        if self._changes < 0 or (self._origin is not None and self._origin[0]._changes != self._origin[1]):
            raise self.caught.refusal("changes a view of its scores in place")

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
        super().__init__(scores.caught)
        self.scores, self.dropout_p = scores, dropout_p
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
