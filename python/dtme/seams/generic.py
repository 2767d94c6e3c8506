"""Attentions of any library, by what they do: one ``scaled_dot_product_attention``, or one that is written out.

Tried on torch 2.13, on attentions written for the tests, on timm 0.5.4, 0.6.13 and 1.0.31, and on transformers 5.24's
PVT and SegFormer. What the arguments of such blocks mean is not known.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import find_tokens, replace_argument
from ..written_out import attention_of_scores, attention_scores, attention_weights
from .base import Attend, KeysValues, NotExpandable, Seam, is_hooked, is_plain_linear
from .catch import Catch, without_deferred
from .caught import Caught

_SEEING = (nn.Softmax, nn.Dropout)
"""Modules that scores and weights go through."""
_NO_TOKENS = ("mask", "bias", "pos", "rel", "rope")
"""Parts of the names of arguments that are not attended to."""


class Reduction(NamedTuple):
    """An attention whose keys and values are of fewer tokens than its queries: those of a coarser grid, say."""

    layers: tuple[nn.Linear, ...]
    """What makes keys and values of the fewer tokens. Task tokens go there: they are not on the grid."""
    num_tokens: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    where: int | str
    """A call of the attention, on as many tokens as are at ``where`` among its arguments."""


class GenericSeam(Seam):
    def __init__(self, block: str, attention: Any) -> None:
        super().__init__(block, attention)
        self.reduction: Reduction | None = None
        self.readings: frozenset[str] | None = None
        """What its scores may be asked for as tensors: what they were asked for when it was tried."""
        self.fixed_tokens: int | None = None
        """The only number of tokens that it runs on, if it does not run on others: a window's."""

    def run(self, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        self.check_hooks()
        return self._run(self._caught(attend, args, kwargs), args, kwargs)

    def tried(self, args: Any, kwargs: Any, *, poisons: bool = False) -> tuple[Any, frozenset[str]]:
        """What the attention returns without task tokens, and what it asked of its scores as tensors.

        Args:
            poisons: let scores and weights that it returns be NaN.
        """
        caught = self._caught(plain_attention, args, kwargs)
        return self._run(caught, args, kwargs, poisons=poisons), frozenset(caught.read)

    def _caught(self, attend: Attend, args: Any, kwargs: Any, replaced: Any = ()) -> Caught:
        tokens = find_tokens(args, kwargs, self.block)[1]
        for name, value in (*zip(self._names, args, strict=False), *kwargs.items()):
            if not isinstance(value, Tensor) or value is tokens or any(part in name for part in _NO_TOKENS):
                continue
            if value.is_floating_point() and value.ndim == 3 and value.shape[-1] == tokens.shape[-1]:
                problem = f"is given {name!r} beside its tokens, to which it may attend instead"
                raise NotExpandable(f"block {self.block!r}: its attention {problem}")
        return Caught(attend, tokens.shape[0], self.block, replaced, self.readings)

    def _run(self, caught: Caught, args: Any, kwargs: Any, *, poisons: bool = False) -> Any:
        with Catch(caught):
            output = type(self.attention).forward(self.attention, *args, **kwargs)
        if caught.num_calls != 1:
            done = f"; {caught.read[0]!r} is done to its scores" if caught.read else ""
            times = f"{caught.num_calls} times in a way that is known, not once{done}"
            raise NotExpandable(f"block {self.block!r}: its attention attends {times}")
        output = without_deferred(output, poisons=poisons)
        if not torch.compiler.is_compiling():
            self._settle(caught)
        return output

    def check_hooks(self) -> None:
        for module in self.attention.modules():
            if isinstance(module, _SEEING) and is_hooked(module):
                raise NotExpandable(
                    f"block {self.block!r}: a hook hangs on the {type(module).__name__} of its attention, whose "
                    "weights are no tensors while task tokens join them: let the attention return them instead"
                )

    def _settle(self, caught: Caught) -> None:
        """Let whatever the attention keeps be tensors.

        Raises:
            NotExpandable: somebody else keeps its scores or weights.
        """
        if not caught.kept():
            return
        for module in self.attention.modules():
            for name, value in vars(module).items():
                if (settled := without_deferred(value)) is not value:
                    vars(module)[name] = settled
            value = settled = None
        if caught.kept():
            raise NotExpandable(
                f"block {self.block!r}: somebody outside of its attention keeps its scores or weights: keep what "
                ".clone() or .detach() makes of them, or let the attention return them"
            )

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out, by a call with plain tokens, how keys and values of others can be had.

        Raises:
            NotExpandable: they cannot; in particular if they are of fewer tokens than the queries, and it is no linear
                layers that make them of those.
        """
        numbers: list[tuple[int, int]] = []
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        before: list[tuple[nn.Module, Tensor, Tensor]] = []

        def attend(query: Tensor, key: Tensor, value: Tensor | None, *args: Any, **options: Any) -> Tensor:
            numbers.append((query.shape[-2], key.shape[-2]))
            before[:] = calls
            return plain_attention(query, key, value, *args, **options)

        def remember(module: nn.Module, inputs: Any, output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                calls.append((module, inputs[0], output))

        handles = [m.register_forward_hook(remember) for m in self.attention.modules() if m is not self.attention]
        try:
            self._run(self._caught(attend, args, kwargs), args, kwargs)
        finally:
            for handle in handles:
                handle.remove()
        num_queries, num_keys = numbers[0]
        self.is_square = num_queries == num_keys
        where, tokens = find_tokens(args, kwargs, self.block)
        if num_queries <= num_keys:
            self._try_numbers(tokens, num_tokens=tokens.shape[1])
            return
        on_fewer = [(m, given, out) for m, given, out in before if given.ndim == 3 and given.shape[1] == num_keys]
        layers: list[Any] = [m for m, _, out in on_fewer if not any(given is out for _, given, _ in on_fewer)]
        if not layers or not all(is_plain_linear(layer) for layer in layers):
            raise NotExpandable(
                f"block {self.block!r}: its attention has {num_keys} keys for {num_queries} queries, which no linear "
                "layers make of as many tokens"
            )
        args, kwargs = replace_argument(args, kwargs, where, None)
        self.reduction = Reduction(tuple(layers), tokens.shape[1], args, kwargs, where)
        self._try_numbers(tokens, num_tokens=num_keys)

    def _try_numbers(self, tokens: Tensor, num_tokens: int) -> None:
        """Whether keys can be had of any number of tokens, or of ``num_tokens`` alone."""
        try:
            for number in (1, 2, 3, 5, 6, 7):  # a table of a window may fit some by accident
                self.keys_values(tokens[:1, :1].expand(-1, number, -1))
        except Exception:  # whatever an attention raises that was made for another number
            self.fixed_tokens = num_tokens
            self.keys_values(tokens[:1, :1])

    def projected(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens (rows, M, p) that keys and values are made of in a call, and those (rows, H, M, d)."""
        read: list[Tensor] = []
        caught: list[KeysValues] = []

        def attend(query: Tensor, key: Tensor, value: Tensor | None, *args: Any, **options: Any) -> Tensor:
            if value is not None:
                caught.append((key, value))
            return plain_attention(query, key, value, *args, **options)

        if self.reduction is None:
            read.append(find_tokens(args, kwargs, self.block)[1])
            self.run(attend, *args, **kwargs)
        else:
            layer = self.reduction.layers[0]
            handle = layer.register_forward_pre_hook(lambda module, given: read.append(given[0]))
            try:
                self.run(attend, *args, **kwargs)
            finally:
                handle.remove()
        return read[0], *caught[0]

    def keys_values(self, tokens: Tensor) -> KeysValues:
        if self.fixed_tokens is None:
            return self._keys_values(tokens)
        # beside zeros: every token's keys are its own, which is tried before any of this is used (block.trial)
        whole, keys, values = self.fixed_tokens, [], []
        for part in tokens.split(whole, 1):
            given = part.shape[1]
            key, value = self._keys_values(F.pad(part, (0, 0, 0, whole - given)))
            keys.append(key[:, :, :given])
            values.append(value[:, :, :given])
        return torch.cat(keys, 2), torch.cat(values, 2)

    def _keys_values(self, tokens: Tensor) -> KeysValues:
        if self.reduction is None:
            return super().keys_values(tokens)
        caught: list[KeysValues] = []

        def catch(query: Tensor, key: Tensor, value: Tensor | None, *args: Any, **options: Any) -> Tensor:
            if value is None:
                return attention_weights(query, key)
            caught.append((key, value))
            return query.new_zeros(*query.shape[:-1], value.shape[-1])

        layers, num_tokens, args, kwargs, where = self.reduction
        grid = tokens.new_zeros(len(tokens), num_tokens, tokens.shape[-1])
        args, kwargs = replace_argument(args, kwargs, where, grid)
        catch.only_keys = True  # type: ignore[attr-defined]
        self._run(self._caught(catch, args, kwargs, [(layer.weight, tokens) for layer in layers]), args, kwargs)
        if any(x.shape[-2] != tokens.shape[1] for x in caught[0]):  # as many as the grid has, and other heads
            raise NotExpandable(f"block {self.block!r}: its attention makes other keys than one for each task token")
        return caught[0]


def plain_attention(query: Tensor, key: Tensor, value: Tensor | None, *args: Any, **options: Any) -> Tensor:
    """``scaled_dot_product_attention``, which also gives its weights, for ``value=None``."""
    scores, shift = options.pop("scores", None), options.pop("shift", None)
    softcap, sinks = options.pop("softcap", None), options.pop("sinks", None)
    if scores is None and (softcap is not None or sinks is not None):
        scores = attention_scores(
            query, key, options.get("attn_mask"), options.get("is_causal", False), options.get("scale"), softcap
        )
    if scores is not None:
        none = key.new_empty(*key.shape[:-2], 0, key.shape[-1])
        no_value = none if value is None else value.new_empty(*value.shape[:-2], 0, value.shape[-1])
        scale, dropout_p = options.get("scale"), options.get("dropout_p", 0.0)
        return attention_of_scores(scores, query, value, none, no_value, scale, shift, dropout_p, sinks=sinks)
    if value is None:
        mask, scale = options.get("attn_mask"), options.get("scale")
        return attention_weights(query, key, attn_mask=mask, scale=scale)
    options.setdefault("enable_gqa", query.shape[1] != key.shape[1])
    return F.scaled_dot_product_attention(query, key, value, *args, **options)
