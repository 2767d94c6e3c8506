"""A block's inner product over the streams of its tasks, every stream's task keys joined to its own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dtme_kernels

from ..seams import KeysValues, NotExpandable
from ..streams import unfold
from ..written_out import attention_of_scores, attention_scores, attention_weights


def attend(
    block: str,
    num_streams: int,
    joined: list[int],
    task_kv: KeysValues | None,
    num_rows: int | None,
    is_square: bool,
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
) -> Tensor:
    """``scaled_dot_product_attention`` over (T * B, H, N, d); the weights of the shared keys where ``value`` is None.

    Args:
        block: its name, for messages.
        num_streams: T.
        joined: the streams that have task tokens.
        task_kv: their keys and values, (len(joined), H, t, d) each.
        num_rows: of the block's tokens, where it is known: T * B, or a multiple of it, in windows.
        is_square: whether there are as many queries as keys.
        scores: those of the shared keys, where they are not scale * query · key + mask.
        shift: added to all scores, those of the task keys too.
    """
    if (is_square and query.shape[-2] != key.shape[-2]) or query.shape[0] % num_streams:
        sizes = f"{query.shape[-2]} queries for {key.shape[-2]} keys"
        raise NotExpandable(f"block {block!r}: its attention is not over its own tokens: {sizes}")
    if num_streams > 1 and num_rows and query.shape[0] % num_rows:
        sizes = f"{query.shape[0]} of {num_rows} rows"
        raise NotExpandable(f"block {block!r}: its attention is given {sizes}, and whose they are is not known")
    if value is not None and key.shape[1] != value.shape[1]:
        sizes = f"{key.shape[1]} heads of keys for {value.shape[1]} of values"
        raise NotExpandable(f"block {block!r}: its attention has {sizes}, which task tokens do not support")
    if attn_mask is not None and attn_mask.ndim < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]

    def part(tensor: Tensor, streams: list[int]) -> Tensor:
        if tensor.shape[0] == 1:  # a mask shared by all rows
            return tensor.unsqueeze(0)
        tensor = unfold(tensor, num_streams)
        return tensor if len(streams) == num_streams else tensor[streams]

    def run(streams: list[int], task_kv: KeysValues) -> Tensor:
        mask = None if attn_mask is None else part(attn_mask, streams)
        q, k = part(query, streams), part(key, streams)
        v = None if value is None else part(value, streams)
        if v is None or scores is not None:
            own = attention_scores(q, k, mask, is_causal, scale) if scores is None else part(scores, streams)
            by = part(shift, streams) if isinstance(shift, Tensor) and shift.ndim else shift
            task_key, task_value = (x.unsqueeze(1) for x in task_kv)
            return attention_of_scores(own, q, v, task_key, task_value, scale, by, dropout_p)
        options: dict[str, Any] = {"is_causal": is_causal, "dropout_p": dropout_p, "scale": scale}
        return dtme_kernels.expanded_attention(q, k, v, task_kv[0], task_kv[1], attn_mask=mask, **options)

    if task_kv is not None and len(joined) == num_streams:
        return run(joined, task_kv).flatten(0, 1)
    rest = [i for i in range(num_streams) if i not in joined]
    no_key, no_value = (
        x.new_empty(len(rest), x.shape[1], 0, x.shape[-1]) for x in (key, key if value is None else value)
    )
    plain = run(rest, (no_key, no_value))
    if task_kv is None:
        return plain.flatten(0, 1)
    order = [*joined, *rest]
    return torch.cat([run(joined, task_kv), plain])[[order.index(i) for i in range(num_streams)]].flatten(0, 1)


def attend_concatenated(
    has_tokens: Tensor | None,
    task_kv: KeysValues,
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
) -> Tensor:
    """One stream, by concatenation; also of a task that is not known before it runs, where only some have task tokens.

    Args:
        has_tokens: (1,) bool, whether the task has; None where it has.
        task_kv: (1, H, t, d) each; hidden by a mask where it has none.
    """
    if scores is not None:
        if has_tokens is not None:
            raise NotExpandable(
                "an attention whose masks put numbers in the place of scores needs its task to be known"
            )
        return attention_of_scores(scores, query, value, task_kv[0], task_kv[1], scale, shift, dropout_p)
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
    key = torch.cat([key, task_kv[0].expand(len(key), -1, -1, -1)], -2)
    if value is None:
        return attention_weights(query, key, mask, False, scale)[..., :num_keys]
    value = torch.cat([value, task_kv[1].expand(len(value), -1, -1, -1)], -2)
    gqa = enable_gqa or query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=gqa)
