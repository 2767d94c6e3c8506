"""``torch.ops.dtme.expanded_attention``: schemas, tables, gradients, implementations; also of tensors still packed."""

from typing import Any

import torch
from torch import Tensor

from ..launch import cannot_run, highest
from ..registry import Gradient, Kernel, Operator, differentiable_once, without_last_output
from . import reference
from .arguments import Attention, AttentionBackward, PackedBackward, unpack
from .tiles import MOST_CHANNELS, MOST_CHANNELS_IN_THREE_PARTS

TABLE = {
    "query": "[T] B H>=1 N d>=1",
    "key": "[T] B G>=1 S d; like query",
    "value": "[T] B G S d; like query",
    "task_key": "[T] G t d; like query",
    "task_value": "[T] G t d; like query",
    "attn_mask": "...; bool or floating",
}


def _triton_cannot_attend(a: Attention) -> str | None:
    exact = a.query.dtype == torch.float32 and highest()
    most = MOST_CHANNELS_IN_THREE_PARTS if exact else MOST_CHANNELS
    if a.query.shape[-1] > most:
        precision = " of float32 at matrix precision 'highest'" if exact else ""
        return f"the kernels take {most} channels a head at most{precision}, got {a.query.shape[-1]}"
    return cannot_run(a.query)


# --- query, key and value one by one ---------------------------------------------------------------------------------


def _reference(*args: Any, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    return reference.expanded_attention(Attention(*args), dropout_p)


def _reference_backward(*args: Any) -> tuple[Tensor, ...]:
    b = AttentionBackward.of(*args)
    return reference.expanded_attention_backward(b.grad, b.attention, b.wants_mask_grad)


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from .kernel import expanded_attention

    return expanded_attention(Attention(*args))


def _triton_backward(*args: Any) -> tuple[Tensor, ...]:
    from .kernel import expanded_attention_backward

    return expanded_attention_backward(AttentionBackward.of(*args))


def _triton_cannot_run(*args: Any) -> str | None:
    return _triton_cannot_attend(Attention(*args))


def _triton_cannot_run_backward(*args: Any) -> str | None:
    return _triton_cannot_attend(AttentionBackward.of(*args).attention)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _fake_outputs(Attention(*args))


def _fake_outputs(a: Attention) -> tuple[Tensor, Tensor]:
    *lead, num_heads, num_queries, d = a.query.shape
    output = a.query.new_empty((*lead, num_queries, num_heads, d)).transpose(-3, -2)
    return output, a.query.new_empty(a.statistics_shape, dtype=torch.float32)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    b = AttentionBackward.of(*args)
    query, key, value, task_key, task_value, attn_mask, _, _ = b.attention
    d_mask = query.new_empty(0)
    if b.wants_mask_grad and attn_mask is not None:
        d_mask = attn_mask.new_empty(attn_mask.shape)
    return *(x.new_empty(x.shape) for x in (query, key, value, task_key, task_value)), d_mask


def _check(*args: Any) -> None:
    a = Attention(*args)
    heads, key_heads = a.query.shape[-3], a.key.shape[-3]
    if heads % key_heads:
        raise ValueError(f"key heads must divide the {heads} heads of query, got {key_heads}")
    check_scale(a.scale)
    if a.attn_mask is None:
        return
    if a.is_causal:
        raise ValueError("is_causal must be False with an attn_mask")
    full = (*a.query.shape[:-1], a.key.shape[-2])
    sizes = zip(reversed(a.attn_mask.shape), reversed(full), strict=False)
    if not 1 <= a.attn_mask.dim() <= len(full) or any(have not in (want, 1) for have, want in sizes):
        raise ValueError(f"attn_mask must broadcast to {full}, got {tuple(a.attn_mask.shape)}")


def check_scale(scale: float | None) -> None:
    if scale is not None and not abs(scale) <= 1e30:  # times a query, infinite in float32
        raise ValueError(f"scale must be a number in [-1e30, 1e30], got {scale}")


def _check_backward(*args: Any) -> None:
    b = AttentionBackward.of(*args)
    _check(*b.attention)
    _check_statistics(b.statistics, b.attention)


def _check_statistics(statistics: Tensor, a: Attention) -> None:
    if statistics.shape != a.statistics_shape:
        raise ValueError(f"statistics must be {a.statistics_shape}, got {tuple(statistics.shape)}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, attn_mask, ctx.is_causal, ctx.scale = inputs
    ctx.mask_grad = attn_mask is not None and attn_mask.is_floating_point() and attn_mask.requires_grad
    ctx.save_for_backward(*output, *tensors, attn_mask)
    _, statistics = output
    ctx.mark_non_differentiable(statistics)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    args = (*ctx.saved_tensors, ctx.is_causal, ctx.scale, ctx.mask_grad)
    *grads, d_mask = expanded_attention_backward.backward_of(ctx, grad, *args)
    return *grads, d_mask if ctx.mask_grad else None, None, None


# statistics: how a kernel's own backward finds the probabilities again; the backward of the reference and of C++, which
# needs none, is given none
TENSORS = "Tensor query, Tensor key, Tensor value, Tensor task_key, Tensor task_value"
ARGUMENTS = f"{TENSORS}, Tensor? attn_mask=None, bool is_causal=False, float? scale=None"
expanded_attention_backward = Operator(
    f"expanded_attention_backward(Tensor grad, Tensor output, Tensor statistics, {TENSORS}, Tensor? attn_mask,"
    " bool is_causal, float? scale, bool mask_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    TABLE
    | {
        "grad": "[T] B H N d; like query",
        "output": "[T] B H N d; like query",
        "statistics": "[T] B H parts N; float32 or float64",
    },
    reference=_reference_backward,
    fake=_fake_backward,
    triton=Kernel(_triton_backward, _triton_cannot_run_backward),
    cpp="attention.cpp",
    rules=_check_backward,
    gradient=differentiable_once("expanded_attention"),
)
expanded_attention = Operator(
    f"expanded_attention_forward({ARGUMENTS}) -> (Tensor output, Tensor statistics)",
    TABLE,
    reference=_reference,
    fake=_fake,
    triton=Kernel(_triton, _triton_cannot_run),
    cpp="attention.cpp",
    rules=_check,
    gradient=Gradient(_save, _backward),
    public="expanded_attention",
    low_precision=True,
)
without_last_output(f"expanded_attention({ARGUMENTS}) -> Tensor", expanded_attention)

# --- packed as one projection leaves them ----------------------------------------------------------------------------

PACKED_TABLE = {"qkv": "T B N 3 H>=1 d>=1", "task_kv": "T t 2 H d; like qkv"}


def _reference_packed_backward(*args: Any) -> tuple[Tensor, Tensor]:
    b = PackedBackward(*args)
    return reference.packed_attention_backward(b.grad, b.qkv, b.task_kv, b.scale)


def _triton_packed(qkv: Tensor, task_kv: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    from .kernel import expanded_attention

    return expanded_attention(unpack(qkv, task_kv, scale))


def _triton_packed_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from .kernel import packed_attention_backward

    return packed_attention_backward(PackedBackward(*args))


def _triton_cannot_run_packed(qkv: Tensor, task_kv: Tensor, scale: float | None) -> str | None:
    return _triton_cannot_attend(unpack(qkv, task_kv))


def _triton_cannot_run_packed_backward(*args: Any) -> str | None:
    return _triton_cannot_attend(PackedBackward(*args).attention)


def _fake_packed(qkv: Tensor, task_kv: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    return _fake_outputs(unpack(qkv, task_kv))


def _fake_packed_backward(*args: Any) -> tuple[Tensor, Tensor]:
    b = PackedBackward(*args)
    return b.qkv.new_empty(b.qkv.shape), b.task_kv.new_empty(b.task_kv.shape)


def _check_packed(qkv: Tensor, task_kv: Tensor, scale: float | None) -> None:
    check_scale(scale)


def _check_packed_backward(*args: Any) -> None:
    b = PackedBackward(*args)
    check_scale(b.scale)
    _check_statistics(b.statistics, b.attention)


def _save_packed(ctx: Any, inputs: tuple[Tensor, Tensor, float | None], output: tuple[Tensor, Tensor]) -> None:
    qkv, task_kv, ctx.scale = inputs
    ctx.save_for_backward(*output, qkv, task_kv)
    _, statistics = output
    ctx.mark_non_differentiable(statistics)


def _backward_packed(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *packed_attention_backward.backward_of(ctx, grad, *ctx.saved_tensors, ctx.scale), None


packed_attention_backward = Operator(
    "packed_attention_backward(Tensor grad, Tensor output, Tensor statistics, Tensor qkv, Tensor task_kv, float? scale)"
    " -> (Tensor, Tensor)",
    PACKED_TABLE
    | {
        "grad": "T B H N d; like qkv",
        "output": "T B H N d; like qkv",
        "statistics": "T B H parts N; float32 or float64",
    },
    reference=_reference_packed_backward,
    fake=_fake_packed_backward,
    triton=Kernel(_triton_packed_backward, _triton_cannot_run_packed_backward),
    cpp="attention.cpp",
    rules=_check_packed_backward,
    gradient=differentiable_once("packed_attention"),
)
packed_attention = Operator(
    "packed_attention(Tensor qkv, Tensor task_kv, float? scale=None) -> (Tensor output, Tensor statistics)",
    PACKED_TABLE,
    reference=reference.packed_attention,
    fake=_fake_packed,
    triton=Kernel(_triton_packed, _triton_cannot_run_packed),
    cpp="attention.cpp",
    rules=_check_packed,
    gradient=Gradient(_save_packed, _backward_packed),
    low_precision=True,
)
