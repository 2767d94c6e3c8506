"""The definitions. Everything else is measured against them."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import statistics_shape, unpack

# attention scores held at a time in the backward pass: 2 MB in float32
CHUNK = 2**19


def expanded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    task_key: Tensor,
    task_value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """softmax(q [k ; k_task]^T) [v ; v_task] (Sec. 4.3). Laid out (..., N, H, d), so that merging heads is a view.

    And zeros, for the statistics that a kernel's backward wants and this one's does not.
    """
    heads, key_heads = query.shape[-3], key.shape[-3]
    if heads != key_heads and (key_heads == 0 or heads % key_heads):  # some versions of torch divide by zero
        raise RuntimeError(f"{heads} heads of queries cannot share {key_heads} heads of keys")
    out = F.scaled_dot_product_attention(
        _fold(query),
        _join(key, task_key),
        _join(value, task_value),
        _join_mask(query, key, task_key, attn_mask, is_causal),
        dropout_p,
        scale=scale,
        # a branch, not the comparison itself: under dynamic shapes that is symbolic, and a bool is wanted
        enable_gqa=True if heads != key_heads else False,  # noqa: SIM210
    )
    out = out.transpose(1, 2).contiguous().transpose(1, 2).unflatten(0, query.shape[:-3])
    return out, torch.zeros(statistics_shape(query, attn_mask), dtype=torch.float32, device=query.device)


def expanded_attention_backward(
    grad: Tensor,
    output: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    task_key: Tensor,
    task_value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    mask_grad: bool,
) -> tuple[Tensor, ...]:
    """A few images at a time. A task key's gradient is the sum over the images that share it."""
    lead, num_keys, num_task = query.shape[:-3], key.shape[-2], task_key.shape[-2]
    inputs = [_fold(grad), _fold(query), _join(key, task_key), _join(value, task_value)]
    mask = _join_mask(query, key, task_key, attn_mask, is_causal)
    if mask is not None:
        inputs.append(mask.expand(len(inputs[0]), -1, -1, -1))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = prod(query.shape[-3:-1]) * (num_keys + num_task)
    chunks = zip(*(x.split(max(1, CHUNK // max(1, scores))) for x in inputs), strict=True)
    parts = [_softmax_backward(scale, mask_grad, *chunk) for chunk in chunks]
    d_query, d_key, d_value, d_scores = (torch.cat(x) for x in zip(*parts, strict=True))

    d_key, d_task_key = d_key.unflatten(0, lead).split([num_keys, num_task], -2)
    d_value, d_task_value = d_value.unflatten(0, lead).split([num_keys, num_task], -2)
    grads = (d_query.unflatten(0, lead), d_key, d_value, d_task_key.sum(-4), d_task_value.sum(-4))
    d_mask = query.new_empty(0)
    if mask_grad and attn_mask is not None:
        d_mask = d_scores[..., :num_keys].unflatten(0, lead).sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    return *(x.to(query.dtype).contiguous() for x in grads), d_mask.contiguous()


def packed_attention(qkv: Tensor, task_kv: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The same of what one projection leaves: (T, B, N, 3, H, d), (T, t, 2, H, d)."""
    return expanded_attention(*unpack(qkv, task_kv), scale=scale)


def packed_attention_backward(
    grad: Tensor, output: Tensor, statistics: Tensor, qkv: Tensor, task_kv: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Packed again, so that nothing has to be stacked for the projection's backward."""
    rest = (*unpack(qkv, task_kv), None, False, scale, False)
    *shared, d_task_key, d_task_value, _ = expanded_attention_backward(grad, output, statistics, *rest)
    d_qkv, d_task_kv = torch.stack(shared, 3).transpose(2, 4), torch.stack([d_task_key, d_task_value], 2)
    return d_qkv.contiguous(), d_task_kv.transpose(1, 3).contiguous()


def _softmax_backward(
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
    num_queries, key_heads, groups = query.shape[2], key.shape[1], query.shape[1] // key.shape[1]

    def rows(x: Tensor) -> Tensor:
        """(b, H, N, .) -> (b, key heads, rows, .): the query heads that share a key head stacked."""
        return x.unflatten(1, (key_heads, groups)).flatten(2, 3)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (groups, num_queries)).flatten(1, 2)

    wide = torch.promote_types(query.dtype, torch.float32)
    g, q, k, v = rows(grad).to(wide), rows(query).to(wide), key.to(wide), value.to(wide)
    scores = heads(q @ k.mT) * scale
    if mask is None:
        p = rows(scores.softmax(-1))
    else:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        # a row that sees no key at all gives zeros, as in scaled_dot_product_attention
        p = rows(scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0))
    dp = g @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return heads(ds @ k) * scale, ds.mT @ q * scale, p.mT @ g, heads(ds) if mask_grad else ds.new_empty(0)


def _fold(x: Tensor) -> Tensor:
    """(T, B, H, N, d) or (B, H, N, d) -> (T * B or B, H, N, d)."""
    return x.flatten(0, -4)


def _join(shared: Tensor, task: Tensor) -> Tensor:
    """(T, B, H, S, d) and (T, H, t, d), or both without T -> (T * B or B, H, S + t, d)."""
    return _fold(torch.cat([shared, task.unsqueeze(-4).expand(*shared.shape[:-2], *task.shape[-2:])], -2))


def _join_mask(
    query: Tensor, key: Tensor, task_key: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """The mask over [key ; task_key], (1 or T * B, 1 or H, 1 or N, S + t): every query sees every task key."""
    num_keys = key.shape[-2]
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], num_keys, dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return None
    mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
    mask = mask[(None,) * (query.dim() - mask.dim())]
    mask = F.pad(mask.expand(*mask.shape[:-1], num_keys), (0, task_key.shape[-2]), value=mask.dtype == torch.bool)
    if prod(mask.shape[:-3]) > 1:
        mask = mask.expand(*query.shape[:-3], -1, -1, -1)
    return _fold(mask)


def modulate_concat_attention(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    task_tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """To the letter: modulate, append the task tokens, run the block's norm, qkv and attention, drop their outputs."""
    modulated = (tokens * weight[:, None, None] + bias[:, None, None]).to(tokens.dtype)
    _, num_images, num_tokens, p = modulated.shape
    task_tokens, norm_weight, norm_bias = (x.to(tokens.dtype) for x in (task_tokens, norm_weight, norm_bias))
    expanded = torch.cat([modulated, task_tokens.unsqueeze(1).expand(-1, num_images, -1, -1)], 2)
    normalized = F.layer_norm(expanded, (p,), norm_weight, norm_bias, eps)
    qkv = F.linear(normalized, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return out[..., :num_tokens, :].transpose(2, 3).flatten(3), modulated
