"""A block's inner product over the streams of its tasks, every stream's task keys joined to its own."""

# those of a function made while torch.compile traces are not computed then
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dtme_kernels

from ..caches import Sizes
from ..layouts import unfold
from ..seams import KeysValues, NotExpandable
from ..written_out import attention_of_scores, attention_scores, attention_weights


class OwnTokens(NamedTuple):
    """By what it is told that an attention is over its block's own tokens."""

    block: str
    """Its name, for messages."""
    is_square: bool
    """Whether there are as many keys as queries, but for those that a cache holds of earlier tokens."""
    cached: Sizes | str | None = None
    """What there must be instead with the cache that the attention was given; or why that is not known."""

    def check(self, query: Tensor, key: Tensor) -> None:
        found, cached = Sizes(query.shape[-2], key.shape[-2]), self.cached
        if not self.is_square or found.num_queries == found.num_keys:
            return
        reason = "" if cached is None else f", and {cached}"
        if isinstance(cached, Sizes):
            if found[:2] == cached[:2]:
                return
            reason = f", where its key-value cache says {cached.num_queries} for {cached.num_keys}"
        raise NotExpandable(
            f"block {self.block!r}: its attention is not over its own tokens: {found.num_queries} queries for "
            f"{found.num_keys} keys{reason}"
        )


class JoinedStreams(NamedTuple):
    """The streams of a block, and what joins the attention of some of them."""

    block: str
    """Its name, for messages."""
    num_streams: int
    """T."""
    joined: list[int]
    """The streams that have task tokens."""
    task_kv: KeysValues | None
    """Their keys and values, (len(joined), H, t, d) each."""
    gates: Mapping[int, Tensor] = {}
    """Of those of ``joined`` that have one, (): the share of what the task tokens change that takes effect."""

    def part(self, tensor: Tensor, streams: list[int]) -> Tensor:
        """(T * B, ...) → (len(streams), B, ...)."""
        if tensor.shape[0] == 1:  # a mask shared by all rows
            return tensor.unsqueeze(0)
        tensor = unfold(tensor, self.num_streams)
        return tensor if len(streams) == self.num_streams else tensor[streams]

    def attend(self, run: Callable[[list[int], KeysValues | None], Tensor]) -> Tensor:
        """(T * B, ...), of ``run(streams, their task keys and values)`` → (len(streams), B, ...)."""
        everyone = list(range(self.num_streams))
        if self.task_kv is None:
            return run(everyone, None).flatten(0, 1)
        changed = run(self.joined, self.task_kv)
        alone = [i for i in everyone if i not in self.joined or i in self.gates]
        if not alone:
            return changed.flatten(0, 1)
        plain = run(alone, None)
        streams = dict(zip(alone, plain, strict=True))
        for i, one in zip(self.joined, changed, strict=True):
            gate = self.gates.get(i)
            streams[i] = one if gate is None else streams[i] + gate.to(one.dtype) * (one - streams[i])
        return torch.cat([streams[i] for i in everyone])


def attend(
    streams: JoinedStreams,
    num_rows: int | None,
    own: OwnTokens,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    scores: Tensor | None = None,
    shift: float | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``scaled_dot_product_attention`` over (T * B, H, N, d); the weights of the shared keys where ``value`` is None.

    Args:
        num_rows: of the block's tokens, where it is known: T * B, or a multiple of it, in windows.
        own: what numbers of queries and keys there must be.
        scores: those of the shared keys, where they are not scale * query · key + mask.
        shift: added to all scores, those of the task keys too.
        softcap: what the scores are kept below, those of the task keys too.
        sinks: (H,), scores of a key without a value.
    """
    block = streams.block
    own.check(query, key)
    is_part = streams.num_streams > 1 and num_rows and query.shape[0] % num_rows
    if is_part or query.shape[0] % streams.num_streams:
        sizes = f"{query.shape[0]} of {num_rows or streams.num_streams} rows"
        raise NotExpandable(f"block {block!r}: its attention is given {sizes}, and whose they are is not known")
    if value is not None and key.shape[1] != value.shape[1]:
        sizes = f"{key.shape[1]} heads of keys for {value.shape[1]} of values"
        raise NotExpandable(f"block {block!r}: its attention has {sizes}, which task tokens do not support")
    if attn_mask is not None and attn_mask.ndim < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]

    def run(some: list[int], task_kv: KeysValues | None) -> Tensor:
        mask = None if attn_mask is None else streams.part(attn_mask, some)
        q, k = streams.part(query, some), streams.part(key, some)
        v = None if value is None else streams.part(value, some)
        task_key, task_value = task_kv or [
            x.new_empty(len(some), x.shape[1], 0, x.shape[-1]) for x in (key, key if value is None else value)
        ]
        if v is None or any(x is not None for x in (scores, softcap, sinks)):
            known = None if scores is None else streams.part(scores, some)
            its_scores = attention_scores(q, k, mask, is_causal, scale, softcap) if known is None else known
            by = streams.part(shift, some) if isinstance(shift, Tensor) and shift.ndim else shift
            task_key, task_value = task_key.unsqueeze(1), task_value.unsqueeze(1)
            return attention_of_scores(its_scores, q, v, task_key, task_value, scale, by, dropout_p, softcap, sinks)
        options: dict[str, Any] = {"is_causal": is_causal, "dropout_p": dropout_p, "scale": scale}
        return dtme_kernels.expanded_attention(q, k, v, task_key, task_value, attn_mask=mask, **options)

    return streams.attend(run)


def attend_concatenated(
    has_tokens: Tensor | None,
    task_kv: KeysValues,
    gate: Tensor | None,
    own: OwnTokens | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    scores: Tensor | None = None,
    shift: float | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One stream, by concatenation; also of a task that is not known before it runs, where only some have task tokens.

    Args:
        has_tokens: (1,) bool, whether the task has; None where it has.
        task_kv: (1, H, t, d) each; hidden by a mask where it has none.
        gate: (), the share of what the task tokens change that takes effect; None for all of it.
        own: what numbers of queries and keys there must be; None where they were looked at.
    """
    if own is not None:
        own.check(query, key)
    if gate is not None:
        rest = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, scores, shift, softcap, sinks)
        none = torch.zeros_like(gate, dtype=torch.bool).reshape(1)
        plain, changed = (attend_concatenated(has, task_kv, None, None, *rest) for has in (none, has_tokens))
        return plain + gate.to(plain.dtype) * (changed - plain)
    if any(x is not None for x in (scores, softcap, sinks)):
        if has_tokens is not None:  # hide those of a task that has none
            none = query.new_zeros(1).masked_fill(~has_tokens, -torch.inf)
            shift = none if shift is None else none + shift
        if scores is None:
            scores = attention_scores(query, key, attn_mask, is_causal, scale, softcap)
        return attention_of_scores(scores, query, value, *task_kv, scale, shift, dropout_p, softcap, sinks)
    hidden: Tensor | None = None
    if has_tokens is not None or is_causal:
        hidden = query.new_zeros(query.shape[-2], key.shape[-2])
    if is_causal and hidden is not None:
        hidden = hidden.masked_fill(hidden.new_ones(hidden.shape, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.shape[-2])
        hidden = attn_mask if hidden is None else hidden + attn_mask
    mask: Tensor | None = None
    if hidden is not None:  # task keys are never masked
        visible = query.new_zeros(1)
        if has_tokens is not None:
            visible = visible.masked_fill(~has_tokens, -torch.inf)
        mask = torch.cat([hidden, visible.expand(*hidden.shape[:-1], task_kv[0].shape[-2])], -1)
    num_keys = key.shape[-2]
    key = torch.cat([key, task_kv[0].expand(key.shape[0], -1, -1, -1)], -2)
    if value is None:
        return attention_weights(query, key, mask, False, scale)[..., :num_keys]
    value = torch.cat([value, task_kv[1].expand(value.shape[0], -1, -1, -1)], -2)
    gqa = enable_gqa or query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=gqa)
