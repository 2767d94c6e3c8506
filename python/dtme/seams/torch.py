"""torch's own ``nn.MultiheadAttention``, written out: that of ``nn.TransformerEncoderLayer`` and of torchvision.

Tried on torch 2.13 and torchvision 0.28.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attend, Copied, Library, NotExpandable, Seam, all_shared, by_head


class TorchSeam(Copied):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.attention
        return by_head(F.linear(x, attention.in_proj_weight, attention.in_proj_bias), attention.num_heads)

    def run(
        self,
        attend: Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's; the weights, where they are asked for, are those of the block's own keys.

        With those of the task keys they sum to 1. In training they have not gone through the dropout, as torch's have.
        ``expand`` refuses blocks whose output depends on them; what is left is a caller who throws them away, or looks
        at them. ``is_causal`` only says what ``attn_mask`` is, without which torch refuses it as well.
        """
        if key is not query or value is not query:
            raise NotExpandable(f"block {self.block!r}: its attention must be self-attention, with one tensor for all")
        if is_causal and attn_mask is None:
            raise NotExpandable(f"block {self.block!r}: its attention is given is_causal=True without an attn_mask")
        attention = self.attention
        mask = self._mask(query.shape[0], key_padding_mask, attn_mask)
        dropout = attention.dropout if attention.training else 0.0
        q, k, v = self.project(query)
        out = attend(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)
        # as torch does, which reads the weights and never calls the module: what PEFT hangs on that has no effect
        out = F.linear(out, attention.out_proj.weight, attention.out_proj.bias)
        if not need_weights:
            return out, None
        weights = attend(q, k, None, attn_mask=mask).to(q.dtype)
        return out, weights.mean(1) if average_attn_weights else weights

    def _mask(self, rows: int, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """torch's two masks, whose True means hidden, as one additive mask (1 or rows, 1 or H, 1 or N, S)."""
        dtype, num_heads = self.attention.in_proj_weight.dtype, self.attention.num_heads
        padding, mask = (
            m if m is None or m.is_floating_point() else torch.zeros_like(m, dtype=dtype).masked_fill(m, -torch.inf)
            for m in (padding, mask)
        )
        if mask is not None:
            if mask.ndim == 3 and mask.shape[0] != rows * num_heads:
                raise self._other_rows("attn_mask", mask, f"{rows} rows of {num_heads} heads")
            mask = mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (rows, num_heads))
        if padding is None:
            return mask
        if padding.shape[0] != rows:
            raise self._other_rows("key_padding_mask", padding, f"{rows} rows")
        padding = padding[:, None, None]
        return padding if mask is None else padding + mask

    def _other_rows(self, name: str, mask: Tensor, wanted: str) -> NotExpandable:
        return NotExpandable(
            f"block {self.block!r}: its attention has {wanted}, but its {name} is {tuple(mask.shape)}: give masks to "
            "the block as arguments, so that they are repeated for the tasks as its tokens are"
        )


def _seam(module: nn.Module) -> type[Seam] | str | None:
    if type(module) is not nn.MultiheadAttention:
        return None
    if not module._qkv_same_embed_dim:
        return "its nn.MultiheadAttention has kdim or vdim: it attends to other tokens than the block's"
    if module.add_zero_attn or module.bias_k is not None:
        option = "add_zero_attn=True" if module.add_zero_attn else "add_bias_kv=True"
        return f"its nn.MultiheadAttention was built with {option}, whose further key task tokens do not support"
    return TorchSeam


_PADDING = {2: 0}  # (B, N)
_MASK = {2: None, 3: 0}  # (N, N), or (B * H, N, N)

LIBRARY = Library(
    "torch",
    _seam,
    arguments={
        **dict.fromkeys(("src_mask", "tgt_mask", "memory_mask"), _MASK),
        **dict.fromkeys(("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"), _PADDING),
        "memory": {3: 0},
        **all_shared("is_causal", "tgt_is_causal", "memory_is_causal"),
    },
)
