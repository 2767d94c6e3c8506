"""Scores and weights of an attention that is written out, put off until it is known what they are for.

``Scores`` stands for ``query @ key.mT`` and remembers what is then done to it, as far as that is a scale, a bias or a
mask. Its softmax, ``Maps``, waits as well; and the product of that with the values hands query, key, value, mask,
dropout and scale to whoever attends, as a call of ``scaled_dot_product_attention`` does. Whatever else is asked of
either is asked of the tensor that it stands for, which is then computed (``catch``). Such a reading must not come back:
what was read may be added, as a shift of all keys, but no longer changes what single keys get.
"""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .caught import Aside, Caught

Factor = float | Tensor

_OF_GRAPH = ("data", "grad", "register_hook", "requires_grad_", "retain_grad", "backward")
"""Attributes of a tensor by which its gradient, or its memory, is reached."""


class Deferred:
    """A tensor that is computed where something needs it as one."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __init__(self, caught: Caught) -> None:
        self.caught = caught
        self.has_gradient = torch.is_grad_enabled()
        self._computed: tuple[Tensor, int, bool] | None = None
        if not torch.compiler.is_compiling():
            caught.made.append(weakref.ref(self))

    def tensor(self) -> Tensor:
        """With a graph where one is wanted, also if it was read without before."""
        self.check()
        if self._computed is None or (torch.is_grad_enabled() and not self._computed[2]):
            with Aside(self.caught):
                tensor = self._compute()
            self._computed = tensor, version(tensor), torch.is_grad_enabled()
        return self._computed[0]

    def _compute(self) -> Tensor:
        raise NotImplementedError

    def check(self) -> None:
        """Refuse what was written to behind its back."""
        if self._computed is not None and version(self._computed[0]) != self._computed[1]:
            raise self.caught.refusal("writes into its scores or weights")

    def check_mode(self) -> None:
        """What is remembered is done with gradients if they are wanted, as autograd would see it."""
        if torch.is_grad_enabled() != self.has_gradient:
            raise self.caught.refusal("computes with its scores in one place with gradients and in another without")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _OF_GRAPH:
            raise self.caught.refusal(f"uses {name!r} of its scores or weights")
        return getattr(self.read(name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_GRAPH:
            raise self.caught.refusal(f"sets {name!r} of its scores or weights")
        object.__setattr__(self, name, value)

    def read(self, name: str) -> Tensor:
        """The tensor, for something that is not remembered."""
        self.caught.remember_reading(name)
        return self.tensor()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]


def version(tensor: Tensor) -> int:
    """How often it was written to, where that is known."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


_STEPS = ("steps", "factor", "bias", "shift", "is_filled", "is_ambiguous")
"""What scores remember of what was done to them."""


class Scores(Deferred):
    """``query @ key.mT``, of queries (..., N, d) and keys (..., M, d), and what was done to it."""

    def __init__(self, caught: Caught, query: Tensor, key: Tensor) -> None:
        super().__init__(caught)
        self.query, self.key, self.device = query, key, query.device
        self.base = torch.Size(
            (*torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]), query.shape[-2], key.shape[-2])
        )
        self.shape, self.dtype = self.base, torch.promote_types(query.dtype, key.dtype)
        self.steps: tuple[tuple[str, Any, Any], ...] = ()
        """As they were asked for: what a reader of the scores sees."""
        self.factor: Factor = 1.0
        self.bias: Tensor | None = None
        """(..., N or 1, M), of the shared keys alone."""
        self.shift: Factor | None = None
        """(..., N or 1, 1), of all keys: the softmax does not change by it."""
        self.is_filled = False
        """Whether a mask puts a number in the place of scores, as adding it does not."""
        self.is_ambiguous = False
        """Whether something of one column was added to scores of one key: of that key, or of all."""
        self._inputs = [(query, version(query)), (key, version(key))]
        self._was_read = [False]  # of all that one product has become
        self._changes = [0]  # in place, of all views of one tensor
        self._changes_seen = 0

    def copy(self) -> "Scores":
        self.check()
        other = Scores(self.caught, self.query, self.key)
        for name in (*_STEPS, "shape", "dtype", "has_gradient"):
            setattr(other, name, getattr(self, name))
        other._inputs, other._was_read = [*self._inputs], self._was_read
        return other

    def become(self, other: "Scores") -> "Scores":
        """An operation in place."""
        self.check()
        for name in (*_STEPS, "_inputs"):
            setattr(self, name, getattr(other, name))
        self._computed = None
        self._changes[0] += 1
        self._changes_seen = self._changes[0]
        return self

    def check(self) -> None:
        super().check()
        if self._changes[0] != self._changes_seen:
            raise self.caught.refusal("changes a view of its scores in place")
        if any(version(tensor) != before for tensor, before in self._inputs):
            raise self.caught.refusal("writes into what its scores are made of")

    def read(self, name: str) -> Tensor:
        self._was_read[0] = True
        return super().read(name)

    def _compute(self) -> Tensor:
        scores = self.query @ self.key.mT
        for kind, what, value in self.steps:
            if kind == "scale":
                scores = scores * what
            elif kind == "add":
                scores = scores + what
            elif kind == "subtract":
                scores = scores - what
            elif kind == "fill":
                scores = scores.masked_fill(what, value)
            elif kind == "view":
                scores = scores.reshape(what)
            else:
                scores = scores.to(what)
        return scores

    # --- steps, each of which returns NotImplemented where it is not known what it would mean for task keys -----------

    def _after(self, kind: str, what: Any, value: Any = None) -> "Scores":
        other = self.copy()
        other.steps = (*self.steps, (kind, what, value))
        if isinstance(what, Tensor):
            other._inputs.append((what, version(what)))
        return other

    def scaled(self, by: Any) -> Any:
        if not isinstance(by, (int, float, Tensor)):
            return NotImplemented
        factor: Any = by
        if isinstance(by, Tensor) and by.ndim:
            factor = None if by.shape[-1] != 1 or self._was_read[0] else self._base(by)
        if factor is None:
            return NotImplemented
        other = self._after("scale", by)
        other.factor = self.factor * factor
        other.bias = None if self.bias is None else self.bias * factor
        other.shift = None if self.shift is None else self.shift * factor
        return self._promoted(other, by)

    def plus(self, term: Any, sign: int = 1) -> Any:
        if not isinstance(term, (int, float, Tensor)):
            return NotImplemented
        other = self._after("add" if sign == 1 else "subtract", term)
        known: Any = term
        if isinstance(term, Tensor):
            known = term if term.is_floating_point() else term.to(self.dtype)
        known = known if sign == 1 else -known
        if not isinstance(known, Tensor) or not known.ndim:
            other.shift = known if self.shift is None else self.shift + known
            return self._promoted(other, term)
        if (known := self._base(known)) is None:
            return NotImplemented
        if known.shape[-1] == 1 != self.base[-1]:
            other.shift = known if self.shift is None else self.shift + known
        elif self._was_read[0]:
            return NotImplemented
        else:
            other.is_ambiguous = self.is_ambiguous or known.shape[-1] == 1
            other.bias = known if self.bias is None else self.bias + known
        return self._promoted(other, term)

    def filled(self, mask: Any, value: Any) -> Any:
        if not isinstance(mask, Tensor) or not mask.ndim or self._was_read[0]:
            return NotImplemented
        if isinstance(value, Tensor) and (value.ndim or value.requires_grad):
            return NotImplemented
        if isinstance(value, Tensor) and not torch.compiler.is_compiling():
            value = value.item()
        other = self._after("fill", mask.bool(), value)
        if (known := self._base(mask)) is None:
            return NotImplemented
        known = known.expand(*known.shape[:-1], self.base[-1]).bool()
        bias = torch.zeros((), dtype=self.dtype, device=mask.device) if self.bias is None else self.bias
        bias = bias.to(torch.promote_types(bias.dtype, self.dtype))
        other.bias = bias.masked_fill(known, value) if bias.ndim else torch.where(known, value, bias)
        other.is_filled = self.is_filled or isinstance(value, Tensor) or value != -math.inf
        return other

    def viewed(self, shape: Sequence[int]) -> Any:
        """Another view of the leading axes; queries and keys stay the last two."""
        if -1 in shape:
            known = math.prod([size for size in shape if size != -1])
            shape = [math.prod(self.shape) // max(known, 1) if size == -1 else size for size in shape]
        if len(shape) < 3 or tuple(shape[-2:]) != tuple(self.base[-2:]) or math.prod(shape) != math.prod(self.base):
            return NotImplemented
        other = self._after("view", tuple(shape))
        other.shape = torch.Size(shape)
        other._changes, other._changes_seen = self._changes, self._changes_seen
        return other

    def cast(self, dtype: torch.dtype) -> "Scores":
        if dtype == self.dtype:
            return self
        other = self._after("cast", dtype)
        other.dtype = dtype
        return other

    def _promoted(self, other: "Scores", by: Any) -> "Scores":
        if isinstance(by, Tensor) and by.ndim and by.is_floating_point():
            other.dtype = torch.promote_types(self.dtype, by.dtype)
        return other

    def _base(self, tensor: Tensor) -> Tensor | None:
        """``tensor``, which meets scores of the present shape, so that it meets them as they were made."""
        if tensor.ndim > len(self.shape):
            return None
        if self.shape == self.base:
            return tensor[(None,) * (len(self.base) - tensor.ndim)]
        last = tensor.shape[-1]
        return tensor.expand(*self.shape[:-1], last).reshape(*self.base[:-1], last)

    # --- what it was for ----------------------------------------------------------------------------------------------

    def attended(self, value: Tensor | None, dropout_p: float = 0.0) -> Tensor:
        """What ``attend`` makes of the queries, keys and ``value`` (..., M, d); of None the weights (..., N, M)."""
        self.check()
        only_keys = getattr(self.caught.attend, "only_keys", False)
        if value is not None:
            self.check_mode()
            self.caught.count()
            if self.is_ambiguous and not only_keys:
                raise self.caught.refusal("adds one number to the score of one key, of that or of all keys,")
        query, scale = self.query, 1.0
        if isinstance(self.factor, (int, float)):
            scale = float(self.factor)
        else:
            query = query * self.factor
        dtype = torch.promote_types(query.dtype, self.key.dtype)
        dtype = dtype if value is None else torch.promote_types(dtype, value.dtype)
        parts = [self._by_row(part).to(dtype) for part in (query, self.key)]
        options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
        with Aside(self.caught):
            if not only_keys:  # a table made for the block's own tokens does not fit others
                options |= self._of_scores(dtype)
            if value is None:
                return self.caught.attend(*parts, None, **options).reshape(self.shape)
            out = self.caught.attend(*parts, self._by_row(value).to(dtype), **options)
        return out.reshape(*self.shape[:-1], value.shape[-1]).to(value.dtype)

    def _of_scores(self, dtype: torch.dtype) -> dict[str, Any]:
        """The bias as a mask; or the scores themselves, where no bias, or none of ``dtype``, says what they are."""
        if self.is_filled or (self.bias is not None and self.bias.dtype.itemsize > dtype.itemsize):
            is_wide = isinstance(self.shift, Tensor) and self.shift.ndim > 0
            shift = self._bias_by_row(self.shift) if is_wide else self.shift  # type: ignore[arg-type]
            return {"scores": self._by_row(self.tensor().reshape(self.base)), "shift": shift}
        return {} if self.bias is None else {"attn_mask": self._bias_by_row(self.bias).to(dtype)}

    def _by_row(self, tensor: Tensor) -> Tensor:
        """(..., N, d) as (rows, H, N, d)."""
        if tensor.ndim == 3:
            return tensor.reshape(self.caught.rows, tensor.shape[0] // max(self.caught.rows, 1), *tensor.shape[1:])
        return tensor if tensor.ndim == 4 else tensor.flatten(0, -4)

    def _bias_by_row(self, bias: Tensor) -> Tensor:
        if bias.ndim == 3:
            return bias.unsqueeze(0) if bias.shape[0] == 1 else self._by_row(bias)
        if bias.ndim == 4:
            return bias
        if all(size == 1 for size in bias.shape[:-3]):
            return bias.reshape(1, *bias.shape[-3:])
        return bias.expand(*self.base[:-3], *bias.shape[-3:]).flatten(0, -4)


class Maps(Deferred):
    """The softmax of scores over the keys, perhaps with dropout."""

    def __init__(self, scores: Scores, dtype: torch.dtype, dropout_p: float = 0.0) -> None:
        super().__init__(scores.caught)
        self.scores, self.dropout_p = scores, dropout_p
        self.shape, self.dtype, self.device = scores.shape, dtype, scores.device

    def _compute(self) -> Tensor:
        """(..., N, M): the weights of the shared keys, which with those of task keys sum to 1; without dropout."""
        return self.scores.attended(None).to(self.dtype)

    def read(self, name: str) -> Tensor:
        if self.dropout_p:
            raise self.caught.refusal(f"does {name!r} to its weights after dropout")
        return super().read(name)

    def viewed(self, shape: Sequence[int]) -> Any:
        scores = self.scores.viewed(shape)
        return scores if scores is NotImplemented else Maps(scores, self.dtype, self.dropout_p)

    def cast(self, dtype: torch.dtype) -> "Maps":
        return self if dtype == self.dtype else Maps(self.scores, dtype, self.dropout_p)

    def attended(self, value: Tensor) -> Tensor:
        self.check()
        self.check_mode()
        if self.shape != self.scores.base:
            raise self.caught.refusal("rearranges its weights before it takes them to its values")
        return self.scores.attended(value, self.dropout_p)
