"""Triton: lower-triangle tiles of every layer's X^T X in one launch, and its gradient.

The fewest bytes are one read of the tokens and one read and write of the accumulators; the fewest operations
``M p (p + 1)`` a layer. At p = 768 one layer has 21 lower tiles, too few for a GPU, and twelve have 252: all layers
share a launch, and only where that leaves multiprocessors idle are the tokens split too. Splits leave float32 partial
tiles, which a second launch adds in a fixed order to the accumulators, in their dtype and to both triangles.

No grid comes near 2^31 programs, which Triton 3.6 would skip: a program takes a tile of 64 by 64 at least.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import chip, collapse, highest, in_reach, on_device
from .tiles import tile


@triton.jit
def _pick(items, index):
    """items[index] of a tuple, for an index known at run time."""
    chosen = items[0]
    for i in tl.static_range(1, len(items)):
        chosen = tl.where(index == i, items[i], chosen)
    return chosen


@triton.jit
def _lower_tile(index):
    """Row and column of the index-th tile on and below the diagonal, counted along the rows."""
    row = ((tl.sqrt_rn(8.0 * index + 1.0) - 1.0) / 2.0).to(tl.int32)
    return row, index - row * (row + 1) // 2


@triton.jit(do_not_specialize=["outer", "inner", "steps"])
def _multiply(
    layers,
    partials,
    outer,
    inner,
    p,
    stride_outer,
    stride_inner,
    stride_channel,
    steps,
    PRECISION: tl.constexpr,
    PROMOTE: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    """partials[split, layer, tile] = X_row^T X_column over one split of the tokens; ``steps`` of BT tokens a split."""
    tile, layer, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x = _pick(layers, layer)
    row, column = _lower_tile(tile)
    rows = row * BC + tl.arange(0, BC)  # [BC]
    columns = column * BC + tl.arange(0, BC)  # [BC]
    chunks = tl.cdiv(inner, BT)
    begin = split * steps
    end = tl.minimum(begin + steps, outer * chunks)
    b_sum = tl.zeros([BC, BC], tl.float32)
    for first in range(begin, end, PROMOTE):
        # tensor cores round towards zero whenever they add to their accumulator, which shows in long sums: start afresh
        b_part = tl.zeros([BC, BC], tl.float32)
        for step in range(first, tl.minimum(first + PROMOTE, end)):
            token = (step % chunks) * BT + tl.arange(0, BT)  # [BT]
            start = x + (step // chunks).to(tl.int64) * stride_outer + token.to(tl.int64) * stride_inner  # [BT]
            # the rows as they are multiplied: of a tile that ``tl.trans`` turns, float32 would come by 4 bytes
            inside = (rows < p)[:, None] & (token < inner)[None, :]
            b_rows = tl.load(start[None, :] + rows[:, None] * stride_channel, inside, 0.0)  # [BC, BT]
            inside = (token < inner)[:, None] & (columns < p)[None, :]
            b_columns = tl.load(start[:, None] + columns[None, :] * stride_channel, inside, 0.0)  # [BT, BC]
            b_part = tl.dot(b_rows, b_columns, b_part, input_precision=PRECISION)
        b_sum += b_part
    number = (split * tl.num_programs(1) + layer) * tl.num_programs(0) + tile
    cell = tl.arange(0, BC)[:, None] * BC + tl.arange(0, BC)[None, :]  # [BC, BC]
    tl.store(partials + number.to(tl.int64) * (BC * BC) + cell, b_sum)


@triton.jit(do_not_specialize=["splits"])
def _accumulate(accumulators, partials, splits, p, stride_row, stride_column, BC: tl.constexpr, BS: tl.constexpr):
    """accumulators[layer] += sum of partials over the splits, first split first, and its mirror image."""
    tile, layer, slab = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    accumulator = _pick(accumulators, layer)
    row, column = _lower_tile(tile)
    r = slab * BS + tl.arange(0, BS)[:, None]  # within the tile
    c = tl.arange(0, BC)[None, :]
    i, j = row * BC + r, column * BC + c
    below = i >= j  # of a tile on the diagonal the upper half is not used, for symmetry to the last bit
    start = (layer * tl.num_programs(0) + tile).to(tl.int64) * (BC * BC)
    stride_split = (tl.num_programs(1) * tl.num_programs(0)).to(tl.int64) * (BC * BC)
    b_sum = tl.zeros([BS, BC], tl.float32)
    for split in range(splits):
        b_sum += tl.load(partials + split * stride_split + start + r * BC + c, below, 0.0)
    inside = below & (i < p) & (j < p)
    lower = accumulator + i.to(tl.int64) * stride_row + j.to(tl.int64) * stride_column
    tl.store(lower, tl.load(lower, inside) + b_sum, inside)
    upper = tl.trans(accumulator + j.to(tl.int64) * stride_row + i.to(tl.int64) * stride_column)  # [BC, BS]
    above = tl.trans(inside & (i != j))
    tl.store(upper, tl.load(upper, above) + tl.trans(b_sum), above)


@triton.jit(do_not_specialize=["outer", "inner"])
def _multiply_symmetric(
    tokens,
    grad,
    out,
    outer,
    inner,
    p,
    stride_outer,
    stride_inner,
    stride_channel,
    stride_row,
    stride_column,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """out = x (G + G^T), a contiguous (tokens, p)."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    inside = (token < outer * inner)[:, None]
    start = tokens + ((token // inner) * stride_outer + (token % inner) * stride_inner)[:, None]
    column = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    b_out = tl.zeros([BT, BC], tl.float32)
    for first in range(0, p, BK):
        channel = first + tl.arange(0, BK)  # [BK]
        b_x = tl.load(start + channel[None, :] * stride_channel, inside & (channel < p)[None, :], 0.0)  # [BT, BK]
        within = (channel < p)[:, None] & (column < p)[None, :]
        b_g = tl.load(grad + channel[:, None] * stride_row + column[None, :] * stride_column, within, 0.0)  # [BK, BC]
        b_g += tl.load(grad + column[None, :] * stride_row + channel[:, None] * stride_column, within, 0.0)
        b_out = tl.dot(b_x.to(tl.float32), b_g, b_out, input_precision=PRECISION)
    tl.store(out + token[:, None] * p + column[None, :], b_out, inside & (column < p)[None, :])


def token_covariance(tokens: Tensor) -> Tensor:
    """(..., p) -> (p, p), float32."""
    p = tokens.shape[-1]
    out = torch.zeros(p, p, dtype=torch.float32, device=tokens.device)
    token_covariance_(out, [tokens])
    return out


def token_covariance_(accumulator: Tensor, tokens: list[Tensor]) -> None:
    """(D, p, p) or (p, p) += D layers of (..., p): one launch for all layers of equal shape and strides."""
    outputs = accumulator.view(-1, *accumulator.shape[-2:]).unbind()
    groups: dict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = {}
    for out, x in zip(outputs, tokens, strict=True):
        if x.numel():
            x = collapse(x.detach())
            groups.setdefault((x.dtype, x.shape, x.stride()), []).append((out, x))
    with on_device(accumulator):
        for group in groups.values():
            _accumulate_layers(*zip(*group, strict=True))


def _accumulate_layers(outputs: tuple[Tensor, ...], layers: tuple[Tensor, ...]) -> None:
    x, out = layers[0], outputs[0]
    outer, inner, p = x.shape
    product = tile("covariance", p, x)
    tile_rows = triton.cdiv(p, product.channels)
    lower = tile_rows * (tile_rows + 1) // 2
    steps = outer * triton.cdiv(inner, product.tokens)
    # about two rounds of programs, each with at least 512 tokens: a split costs a tile written and read
    wanted = triton.cdiv(2 * chip(x.device).multiprocessors, lower * len(layers))
    per_split = max(triton.cdiv(steps, wanted), 512 // product.tokens)
    splits = triton.cdiv(steps, per_split)
    partials = torch.empty(splits, len(layers), lower, product.channels**2, dtype=torch.float32, device=x.device)
    _multiply[(lower, len(layers), splits)](
        *(layers, partials, outer, inner, p, *x.stride(), per_split),
        PRECISION="tf32x3" if x.dtype == torch.float32 and highest() else "tf32",
        **product.options(),
    )
    slab = 32
    grid = (lower, len(layers), product.channels // slab)
    _accumulate[grid](outputs, partials, splits, p, *out.stride(), BC=product.channels, BS=slab, num_warps=4)


def token_covariance_backward(grad: Tensor, tokens: Tensor) -> Tensor:
    """(p, p), (..., p) -> (..., p) in the dtype of the tokens, contiguous."""
    rows, grad = collapse(tokens), in_reach(grad)
    outer, inner, p = rows.shape
    out = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    # a gradient of 11 significant bits or fewer needs no more of G; float32 is multiplied as torch would
    precision = "ieee" if tokens.dtype == torch.float32 and highest() else "tf32"
    product = tile("gradient", p, tokens)
    if out.numel():
        with on_device(tokens):
            _multiply_symmetric[(triton.cdiv(outer * inner, product.tokens), triton.cdiv(p, product.channels))](
                *(rows, grad, out, outer, inner, p, *rows.stride(), *grad.stride()),
                PRECISION=precision,
                **product.options(),
            )
    return out
