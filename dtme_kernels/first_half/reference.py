"""The definition. What is composed of kernels is measured against it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import reference as attention
from ..attention.arguments import Attention
from ..modulation.reference import layer_norm
from .arguments import FirstHalf


def modulate_concat_attention(a: FirstHalf) -> tuple[Tensor, Tensor, Tensor]:
    """To the letter: modulate, append the task tokens, run the block's norm, qkv and attention, drop their outputs.

    Attended, modulated and normalized tokens.
    """
    modulated = (a.tokens * a.weight[:, None, None] + a.bias[:, None, None]).to(a.tokens.dtype)
    _, num_images, num_tokens, _ = modulated.shape
    task_tokens, norm_weight, norm_bias = (x.to(a.tokens.dtype) for x in (a.task_tokens, a.norm_weight, a.norm_bias))
    expanded = torch.cat([modulated, task_tokens.unsqueeze(1).expand(-1, num_images, -1, -1)], 2)
    normalized = layer_norm(expanded, norm_weight, norm_bias, a.eps)
    qkv = F.linear(normalized, a.qkv_weight, a.qkv_bias).unflatten(-1, (3, a.num_heads, -1))
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)
    none = key.new_empty(len(key), a.num_heads, 0, key.shape[-1])
    out, _ = attention.expanded_attention(Attention(query, key, value, none, none, scale=a.scale))
    return out[..., :num_tokens, :].transpose(2, 3).flatten(3), modulated, normalized[:, :, :num_tokens]
