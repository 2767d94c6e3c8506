"""The definitions. Everything else is measured against them."""

from collections.abc import Iterator
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import torch_private
from .arguments import Attention, unpack

# attention scores held at a time: 2 MB in float32
CHUNK = 2**19


def expanded_attention(a: Attention, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """softmax(q [k ; k_task]^T) [v ; v_task] (Sec. 4.3). Laid out (..., N, H, d), so that merging heads is a view.

    And no statistics: -inf, which no backward that reads them takes for some.
    """
    query, key, value = inputs = [_fold(a.query), _join(a.key, a.task_key), _join(a.value, a.task_value)]
    mask = _join_mask(a)
    if dropout_p or not (a.query.device.type == "cpu" or _to_be_differentiated(*inputs, mask)):
        # a branch, not the comparison itself: under dynamic shapes that is symbolic, and a bool is wanted
        shared_heads = True if a.query.shape[-3] != a.key.shape[-3] else False  # noqa: SIM210
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=a.scale, enable_gqa=shared_heads)
    else:
        out = torch.cat([_attend(a.factor, *chunk) for chunk in _chunks(a, inputs, mask)])
    out = out.transpose(1, 2).contiguous().transpose(1, 2).unflatten(0, a.query.shape[:-3])
    return out, torch.full(a.statistics_shape, -torch.inf, dtype=torch.float32, device=a.query.device)


def expanded_attention_backward(grad: Tensor, a: Attention, mask_grad: bool) -> tuple[Tensor, ...]:
    """A few images at a time. A task key's gradient is the sum over the images that share it."""
    lead, num_keys, num_task = a.query.shape[:-3], a.key.shape[-2], a.task_key.shape[-2]
    inputs = [_fold(grad), _fold(a.query), _join(a.key, a.task_key), _join(a.value, a.task_value)]
    parts = [_attend_backward(a.factor, mask_grad, *chunk) for chunk in _chunks(a, inputs, _join_mask(a))]
    d_query, d_key, d_value, d_scores = (torch.cat(x) for x in zip(*parts, strict=True))

    d_key, d_task_key = d_key.unflatten(0, lead).split([num_keys, num_task], -2)
    d_value, d_task_value = d_value.unflatten(0, lead).split([num_keys, num_task], -2)
    grads = (d_query.unflatten(0, lead), d_key, d_value, d_task_key.sum(-4), d_task_value.sum(-4))
    d_mask = a.query.new_empty(0)
    if mask_grad and a.attn_mask is not None:
        d_mask = d_scores[..., :num_keys].unflatten(0, lead).sum_to_size(a.attn_mask.shape).to(a.attn_mask.dtype)
    return *(x.to(a.query.dtype).contiguous() for x in grads), d_mask.contiguous()


def packed_attention(qkv: Tensor, task_kv: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """The same of what one projection leaves: (T, B, N, 3, H, d), (T, t, 2, H, d)."""
    return expanded_attention(unpack(qkv, task_kv, scale))


def packed_attention_backward(grad: Tensor, qkv: Tensor, task_kv: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Packed again, so that nothing has to be stacked for the projection's backward."""
    *shared, d_task_key, d_task_value, _ = expanded_attention_backward(grad, unpack(qkv, task_kv, scale), False)
    d_qkv, d_task_kv = torch.stack(shared, 3).transpose(2, 4), torch.stack([d_task_key, d_task_value], 2)
    return d_qkv.contiguous(), d_task_kv.transpose(1, 3).contiguous()


def _to_be_differentiated(*tensors: Tensor | None) -> bool:
    """Torch's fused attention has one derivative, backwards; plain products and a softmax have all of them.

    On the CPU it also loses a query's NaN, and leaves memory as it was where an expanded query overlaps itself.
    """
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return recorded or torch_private.in_forward_mode() or torch_private.in_transform()


def _chunks(a: Attention, inputs: list[Tensor], mask: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """The inputs, and the mask behind them, of so many images that about ``CHUNK`` scores are held at a time."""
    if mask is not None:
        inputs = [*inputs, mask.expand(len(inputs[0]), -1, -1, -1)]
    if torch.compiler.is_compiling():  # a graph is to hold for every number of images
        return iter([tuple(inputs)])
    scores = prod(a.query.shape[-3:-1]) * (a.key.shape[-2] + a.task_key.shape[-2])
    return zip(*(x.split(max(1, CHUNK // max(1, scores))) for x in inputs), strict=True)


def _attend(scale: float, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """P V, in at least float32: (b, H, N, d), two (b, key heads, S, d) -> (b, H, N, d)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (_rows(query, key), key, value))
    return _heads(_probabilities(q, k, mask, scale, query) @ v, query).to(query.dtype)


def _attend_backward(
    scale: float,
    mask_grad: bool,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dV = P^T dO, dS = P (dP - rowsum(P dP)) with dP = dO V^T, dQ = dS K, dK = dS^T Q; in at least float32.

    (b, H, N, d) -> dQ, dK, dV and, where the mask wants it, dS.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    g, q, k, v = (x.to(wide) for x in (_rows(grad, key), _rows(query, key), key, value))
    p = _probabilities(q, k, mask, scale, query)
    dp = g @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    d_scores = _heads(ds, query) if mask_grad else ds.new_empty(0)
    return _heads(ds @ k, query) * scale, ds.mT @ q * scale, p.mT @ g, d_scores


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, query: Tensor) -> Tensor:
    """P = softmax(scale q k^T + mask), (b, key heads, rows, S). A row that sees no key at all gets zeros."""
    scores = q * scale @ k.mT
    if mask is None:
        return scores.softmax(-1)
    scores = _heads(scores, query)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = scores.isneginf().all(-1, keepdim=True)
    return _rows(scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0), k)


def _rows(x: Tensor, key: Tensor) -> Tensor:
    """(b, H, N, .) -> (b, key heads, rows, .): the query heads that share a key head stacked."""
    return x.unflatten(1, (key.shape[1], x.shape[1] // key.shape[1])).flatten(2, 3)


def _heads(x: Tensor, query: Tensor) -> Tensor:
    """Back again, to the heads of the query."""
    return x.unflatten(2, (query.shape[1] // x.shape[1], query.shape[2])).flatten(1, 2)


def _fold(x: Tensor) -> Tensor:
    """(T, B, H, N, d) or (B, H, N, d) -> (T * B or B, H, N, d)."""
    return x.flatten(0, -4)


def _join(shared: Tensor, task: Tensor) -> Tensor:
    """(T, B, H, S, d) and (T, H, t, d), or both without T -> (T * B or B, H, S + t, d)."""
    return _fold(torch.cat([shared, task.unsqueeze(-4).expand(*shared.shape[:-2], *task.shape[-2:])], -2))


def _join_mask(a: Attention) -> Tensor | None:
    """The mask over [key ; task_key], (1 or T * B, 1 or H, 1 or N, S + t): every query sees every task key."""
    num_keys, attn_mask = a.key.shape[-2], a.attn_mask
    if a.is_causal:
        attn_mask = torch.ones(a.query.shape[-2], num_keys, dtype=torch.bool, device=a.query.device).tril()
    if attn_mask is None:
        return None
    mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(a.query.dtype)
    mask = mask[(None,) * (a.query.dim() - mask.dim())]
    mask = F.pad(mask.expand(*mask.shape[:-1], num_keys), (0, a.task_key.shape[-2]), value=mask.dtype == torch.bool)
    if prod(mask.shape[:-3]) > 1:
        mask = mask.expand(*a.query.shape[:-3], -1, -1, -1)
    return _fold(mask)
