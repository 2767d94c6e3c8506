"""timm: its common ``Attention`` and the windows of Swin v1 and v2, written out. Everything else of it is generic.

Tried on timm 0.5.4, 0.6.13 and 1.0.31. timm itself is never imported here; its classes are told by where they are
defined.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Attend, Copied, Library, Projection, Seam, by_head, class_of, is_hooked, is_plain_linear

# where the common attention is defined, and where earlier releases have it
_COMMON = {("timm.layers.attention", "Attention"), ("timm.models.vision_transformer", "Attention")}
_SWIN, _SWIN_V2 = "timm.models.swin_transformer", "timm.models.swin_transformer_v2"


class TimmSeam(Copied):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.attention
        query, key, value = by_head(attention.qkv(x), attention.num_heads)
        if hasattr(attention, "q_norm"):  # since timm 0.9
            query, key = attention.q_norm(query), attention.k_norm(key)
        return query, key, value

    def run(self, attend: Attend, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attention = self.attention
        dropout = attention.attn_drop.p if attention.training else 0.0
        query, key, value = self.project(x)
        out = attend(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=attention.scale
        )
        out = out.transpose(1, 2).flatten(2)
        out = attention.norm(out) if hasattr(attention, "norm") else out
        if getattr(attention, "gate", None) is not None:
            out = out * attention.gate(x).sigmoid()
        return attention.proj_drop(attention.proj(out))

    def projection(self) -> Projection | None:
        attention, qkv = self.attention, self.attention.qkv
        norms = [norm for name in ("q_norm", "k_norm", "norm") if (norm := getattr(attention, name, None)) is not None]
        plain = is_plain_linear(qkv) and all(type(x) is nn.Identity and not is_hooked(x) for x in norms)
        dropped = attention.training and attention.attn_drop.p
        if not plain or dropped or getattr(attention, "gate", None) or qkv.out_features != 3 * qkv.in_features:
            return None
        return Projection(qkv.weight, qkv.bias, attention.num_heads, attention.scale, self._finish)

    def _finish(self, attended: Tensor) -> Tensor:
        return self.attention.proj_drop(self.attention.proj(attended))


class SwinSeam(Copied):
    """Windows with a bias for each pair of positions: task keys join every window, without a bias and never masked."""

    def num_tokens(self) -> int:
        return math.prod(self.attention.window_size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return by_head(self.attention.qkv(x), self.attention.num_heads)

    def run(self, attend: Attend, x: Tensor, mask: Tensor | None = None) -> Tensor:
        attention = self.attention
        query, key, value = self.project(x)
        bias = self._bias() if mask is None else window_bias(self._bias(), mask, x.shape[0])
        dropout = attention.attn_drop.p if attention.training else 0.0
        out = attend(query, key, value, attn_mask=bias, dropout_p=dropout, scale=self._scale())
        return attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2)))

    def _bias(self) -> Tensor:
        """(1, H, N, N) for the N positions of a window."""
        return self.attention._get_rel_pos_bias()

    def _scale(self) -> float:
        return self.attention.scale


class SwinV2Seam(SwinSeam):
    """Cosines for scores, a learned scale by head, and a bias that a small network makes of the distance."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.attention
        if attention.q_bias is None:
            qkv = attention.qkv(x)
        else:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
            separate = attention.qkv_bias_separate
            qkv = attention.qkv(x) + bias if separate else F.linear(x, attention.qkv.weight, bias)
        query, key, value = by_head(qkv, attention.num_heads)
        return *cosines(query, key, attention.logit_scale), value

    def _bias(self) -> Tensor:
        attention = self.attention
        table = attention.cpb_mlp(attention.relative_coords_table)
        return continuous_bias(table, attention.relative_position_index, self.num_tokens())

    def _scale(self) -> float:
        return 1.0


def window_bias(bias: Tensor, mask: Tensor, rows: int) -> Tensor:
    """(1, H, N, N) and one mask (W, N, N) for each of the W windows of an image → (rows, H, N, N), images first."""
    per_window = bias + mask.unsqueeze(1)
    return per_window.repeat(rows // len(mask), 1, 1, 1)


def cosines(query: Tensor, key: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """A query and a key whose inner product is their cosine times the scale of their head."""
    scale = logit_scale.clamp(max=math.log(100.0)).exp()
    return F.normalize(query, dim=-1) * scale, F.normalize(key, dim=-1)


def continuous_bias(table: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Swin v2's (1, H, N, N) out of what its network makes of all relative positions, (..., H)."""
    bias = table.flatten(0, -2)[index.flatten()].unflatten(0, (num_tokens, num_tokens))
    return 16 * bias.permute(2, 0, 1).sigmoid().unsqueeze(0)


def _seam(module: nn.Module) -> type[Seam] | str | None:
    kind = class_of(module)
    if kind in _COMMON:
        return TimmSeam
    return {(_SWIN, "WindowAttention"): SwinSeam, (_SWIN_V2, "WindowAttention"): SwinV2Seam}.get(kind)


LIBRARY = Library(
    "timm",
    _seam,
    arguments={
        "attn_mask": {2: None, 3: 0, 4: 0},  # (N, N), (B, N, N) or (B, 1 or H, N, N)
        "rope": {
            2: None,
            3: None,
            4: 0,
        },  # (N, d), (H, N, d) of its own in each block, or (B, 1, N, d)
        "shared_rel_pos_bias": {3: None, 4: None},  # (H, N, N) or (1, H, N, N)
    },
    norms={(_SWIN, "SwinTransformerBlock"): "norm1", (_SWIN_V2, "SwinTransformerV2Block"): None},
)
