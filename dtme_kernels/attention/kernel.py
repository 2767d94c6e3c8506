"""Triton: attention over shared keys and, in the same online softmax, over the task keys of a stream.

The fewest operations are ``4 T B H N (S + t) d`` forward and ``10 T B H N (S + t) d`` backward; the fewest bytes one
read of query, key and value and one write of the output. Task keys are read where they are, by every image: a second
loop over them follows the loop over the shared keys, and nothing is concatenated or repeated. The shared keys that fill
no tile join that second loop where they fit into its tile: 197 keys and 6 task keys are computed as 208 columns.

Backward, one kernel walks over the keys for a block of queries, another over the queries for a block of keys: two
products more, and in return every sum has one owner and a fixed order. The first of them also meets all task keys; what
its block of queries has of their gradients it leaves as a partial sum, and the partial sums are added over images,
heads and blocks.

Scores are kept in units of log 2. For every query the forward leaves what finds its probabilities again: the logarithm
of the sum of the exponentials, or, in float32 and with an additive mask, the greatest score and the inverse of the sum.
A query that sees no key has +inf (and 1), so that all its probabilities are 0.
"""

from functools import partial

import torch
import triton
from torch import Tensor

from ..launch import highest, on_device
from .arguments import Attention, AttentionBackward, PackedBackward, unpack
from .backward import key_gradients, mask_gradients, query_gradients
from .blocks import LOG2E
from .forward import attend
from .tiles import Tile, tile


class _Problem:
    """The tensors as the kernels take them: streams and images in one axis, channels side by side."""

    def __init__(self, a: Attention) -> None:
        query, key, value, task_key, task_value, attn_mask, is_causal, _ = a
        scale = a.factor
        self.lead = query.shape[:-3]
        self.rows, self.images = self.lead.numel(), query.shape[-4]
        self.streams = self.lead[0] if len(self.lead) == 2 else 1
        self.heads, self.queries, self.channels = query.shape[-3:]
        self.key_heads, self.keys, self.task_keys = key.shape[-3], key.shape[-2], task_key.shape[-2]
        self.groups = self.heads // self.key_heads
        # the kernels take the greatest score for the greatest after scaling, and 0 times a hidden score must hide it
        self.sign = -1.0 if scale < 0 else 1.0
        self.scale = max(abs(scale) * LOG2E.value, 1e-30)
        query = query if scale >= 0 else -query
        self.shared = [self.fold(x) for x in (query, key, value)]
        self.task = [_aligned(x if x.dim() == 4 else x[None]) for x in (task_key, task_value)]
        self.sizes = (self.scale, self.images, self.heads, self.groups, self.queries, self.keys)
        self.mask, self.mask_strides, self.kind = query, (0, 0, 0, 0, 0), ""
        if attn_mask is not None:
            full = (*(self.lead if len(self.lead) == 2 else (1, *self.lead)), self.heads, self.queries, self.keys)
            if attn_mask.dtype not in (torch.bool, query.dtype):
                attn_mask = attn_mask.to(query.dtype)
            attn_mask = attn_mask.expand(full)
            self.kind = "bool" if attn_mask.dtype == torch.bool else "additive"
            self.mask, self.mask_strides = attn_mask, attn_mask.stride()
            if self.kind == "bool":
                self.mask = attn_mask.view(torch.uint8)
        self.block = max(16, triton.next_power_of_2(self.channels))
        exact = a.statistics_shape[-2] == 2
        self.constants = {"D": self.channels, "MASK": self.kind, "CAUSAL": is_causal, "EXACT": exact, "BD": self.block}
        self.constants["PRECISION"] = "tf32x3" if highest() else "tf32"

    @staticmethod
    def fold(x: Tensor) -> Tensor:
        """(T, B, H, N, d) or (B, H, N, d) -> (T * B or B, H, N, d)."""
        return _aligned(x.flatten(0, -4))

    def tile(self, kernel: str) -> Tile:
        return tile(kernel, self.block, self.shared[0])

    def task_tile(self, own: Tile) -> dict[str, object]:
        """Of a kernel that takes the task keys too: their tile, and whether the last shared keys fit into it.

        They do not join under a mask, which would have to be looked up for that tile as well.
        """
        three_parts = self.shared[0].dtype == torch.float32 and highest()
        widest = 16 if three_parts else min(32, own.keys)  # products in three parts want more registers
        few = self.task_keys + self.keys % own.keys
        joined = self.kind == "" and not self.constants["CAUSAL"] and few <= widest
        return {"JOINED": joined, "BT": 16 if (few if joined else self.task_keys) <= 16 else widest}


def _aligned(x: Tensor) -> Tensor:
    """The kernels read 8 channels at a time: ``x``, or a copy that starts, and has strides, for that.

    Where 8 does not divide the channels, zeros follow them in the copy's memory.
    """
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    if x.stride(-1) == 1 and not any(n % 8 for n in (x.shape[-1], *strides)) and x.data_ptr() % 16 == 0:
        return x
    return x.new_zeros(*x.shape[:-1], triton.cdiv(x.shape[-1], 8) * 8)[..., : x.shape[-1]].copy_(x)


def _strided(*tensors: Tensor) -> tuple[tuple[Tensor, tuple[int, ...]], ...]:
    """As the kernels take them: each with the strides of all axes but the channels."""
    return tuple((x, x.stride()[:-1]) for x in tensors)


def _grid(programs: int) -> tuple[int]:
    """Of so many programs. Triton's launcher counts in 32 bits, and leaves out, without a word, a launch of more."""
    if programs >= 2**31:
        raise RuntimeError(f"one launch takes fewer than 2^31 programs, got {programs}: split the batch")
    return (programs,)


def expanded_attention(a: Attention) -> tuple[Tensor, Tensor]:
    """(..., H, N, d) laid out (..., N, H, d), and what finds the probabilities again, (..., H, 1 or 2, N)."""
    p, query = _Problem(a), a.query
    out = torch.empty(*p.lead, p.queries, p.heads, p.channels, dtype=query.dtype, device=query.device)
    statistics = torch.empty(a.statistics_shape, dtype=torch.float32, device=query.device)
    own = p.tile("forward")
    if out.numel():
        with on_device(query):
            attend[_grid(p.rows * p.heads * triton.cdiv(p.queries, own.queries))](
                *(_strided(*p.shared), _strided(*p.task), (p.mask, p.mask_strides), out, statistics),
                *(*p.sizes, p.task_keys),
                **(p.constants | own.options() | p.task_tile(own)),
            )
    return out.transpose(-3, -2), statistics


def expanded_attention_backward(b: AttentionBackward) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, task key and task value, contiguous, and of an additive mask."""
    a, p = b.attention, _Problem(b.attention)
    shared = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a.query, a.key, a.value)]
    grad, statistics = p.fold(b.grad), b.statistics.contiguous()
    delta, parts = _gradients(p, grad, b.output, statistics, shared)
    d_mask = a.query.new_empty(0)
    if b.wants_mask_grad and a.attn_mask is not None:
        d_mask = _mask_gradient(p, grad, statistics, delta, a.attn_mask)
    return *shared, *(x.view(a.task_key.shape).to(a.query.dtype) for x in parts), d_mask


def packed_attention_backward(b: PackedBackward) -> tuple[Tensor, Tensor]:
    """The gradients of query, key and value are written where the projection's backward reads them."""
    p = _Problem(b.attention)
    d_qkv = torch.empty(b.qkv.shape, dtype=b.qkv.dtype, device=b.qkv.device)
    d_task_kv = torch.empty(b.task_kv.shape, dtype=b.task_kv.dtype, device=b.task_kv.device)
    d_query, d_key, d_value, d_task_key, d_task_value, *_ = unpack(d_qkv, d_task_kv)
    _, parts = _gradients(p, p.fold(b.grad), b.output, b.statistics.contiguous(), [d_query, d_key, d_value])
    d_task_key.copy_(parts[0])
    d_task_value.copy_(parts[1])
    return d_qkv, d_task_kv


def _gradients(
    p: _Problem, grad: Tensor, output: Tensor, statistics: Tensor, shared: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Fill ``shared``: gradients of query, key and value. Delta, and float32 (T, H, t, d) of task key and value.

    ``grad``: folded. ``statistics``: contiguous.
    """
    wide = partial(torch.empty, dtype=torch.float32, device=grad.device)
    delta = wide(p.rows, p.heads, p.queries)
    output = p.fold(output)
    first, second = p.tile("query gradients"), p.tile("key gradients")
    blocks = triton.cdiv(p.queries, first.queries)
    parts = [wide(p.rows, p.heads, blocks, p.task_keys, p.channels) for _ in range(2)]
    d_query, d_key, d_value = (x.flatten(0, -4) for x in shared)  # views
    with on_device(grad):
        if d_query.numel():
            query_gradients[_grid(p.rows * p.heads * blocks)](
                *(*_strided(grad), _strided(*p.shared), _strided(*p.task), (p.mask, p.mask_strides)),
                *(*_strided(output), statistics, *_strided(d_query), tuple(parts), delta, *p.sizes, p.task_keys),
                **(p.constants | first.options() | p.task_tile(first)),
            )
        if d_key.numel():
            key_gradients[_grid(p.rows * p.key_heads * triton.cdiv(p.keys, second.keys))](
                *(*_strided(grad), _strided(*p.shared), (p.mask, p.mask_strides)),
                *(statistics, delta, *_strided(d_key), d_value, *p.sizes),
                **(p.constants | second.options()),
            )
    if p.sign < 0:
        d_query.neg_()
    # of every stream, over its images and over the blocks of the query heads that share a key head
    groups = p.streams, p.images, p.key_heads, p.groups * blocks, p.task_keys, p.channels
    return delta, [x.view(groups).sum((1, 3)) for x in parts]


def _mask_gradient(p: _Problem, grad: Tensor, statistics: Tensor, delta: Tensor, attn_mask: Tensor) -> Tensor:
    """In the shape of the mask. Its broadcast axes of streams, images and heads are summed on chip."""
    leading = (1, *p.lead) if len(p.lead) == 1 else p.lead
    shape = (*(1,) * (5 - attn_mask.dim()), *attn_mask.shape)
    kept = tuple(min(size, full) for size, full in zip(shape, (*leading, p.heads), strict=False))
    own = p.tile("mask gradients")
    d_mask = torch.zeros(*kept, p.queries, p.keys, dtype=torch.float32, device=grad.device)
    if d_mask.numel() and p.rows:
        with on_device(grad):
            tiles = triton.cdiv(p.queries, own.queries) * triton.cdiv(p.keys, own.keys)
            mask_gradients[_grid(tiles * kept[0] * kept[1] * kept[2])](
                *(*_strided(grad), _strided(*p.shared), (p.mask, p.mask_strides)),
                *(statistics, delta, d_mask, p.scale, leading[0], *p.sizes[1:], *kept),
                **(p.constants | own.options()),
            )
    return d_mask.sum_to_size(shape).view(attn_mask.shape).to(attn_mask.dtype)
