"""The definition. Everything else is measured against it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import torch_private


def modulate(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y_t = w_t * x + b_t for every task stream t, in at least float32."""
    return _modulate(tokens, weight, bias).to(tokens.dtype).contiguous()


def modulate_backward(grad: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx = w dy, summed over the streams that share x; dw = sum over a stream's tokens of dy x; db = sum of dy."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    g, x = grad.to(wide), tokens.to(wide)
    d_tokens = g * weight.to(wide)[:, None, None]
    if tokens.dim() == 3:
        d_tokens = d_tokens.sum(0)
    return (
        d_tokens.to(tokens.dtype).contiguous(),
        (g * x).sum((1, 2)).to(weight.dtype),
        g.sum((1, 2)).to(weight.dtype),
    )


def modulate_layer_norm(
    tokens: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """y_t = w_t * x + b_t and z = (y - mean y) / sqrt(var y + eps) * norm_weight + norm_bias."""
    y = _modulate(tokens, weight, bias)
    z = layer_norm(y, norm_weight.to(y.dtype), norm_bias.to(y.dtype), eps)
    return y.to(tokens.dtype).contiguous(), z.to(tokens.dtype).contiguous()


def modulate_layer_norm_forward(
    tokens: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and no statistics, (2, T, B, N): -inf, which no backward that reads them takes for some."""
    y, z = modulate_layer_norm(tokens, weight, bias, norm_weight, norm_bias, eps)
    return y, z, y.new_full((2, *y.shape[:-1]), -torch.inf, dtype=torch.float32)


def modulate_layer_norm_backward(
    grad_modulated: Tensor,
    grad_normalized: Tensor,
    statistics: Tensor,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """With s = (y - mean) / std and ds = norm_weight dz: dy += (ds - mean ds - s mean(ds s)) / std."""
    y = _modulate(tokens, weight, bias)
    s, _, inverse_std = torch.native_layer_norm(y, y.shape[-1:], None, None, eps)
    dz = grad_normalized.to(s.dtype)
    ds = dz * norm_weight.to(s.dtype)
    ds = ds - ds.mean(-1, keepdim=True) - s * (ds * s).mean(-1, keepdim=True)
    dy = grad_modulated.to(s.dtype) + ds * inverse_std
    d_norm = ((dz * s).sum((0, 1, 2)), dz.sum((0, 1, 2)))
    return *modulate_backward(dy, tokens, weight), *(x.to(norm_weight.dtype) for x in d_norm)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Torch's own, or, in forward mode, through which torch's own has a wrong second derivative, its formula."""
    if not (torch_private.in_forward_mode() or torch_private.in_transform()):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y * weight + bias).to(x.dtype)


def _modulate(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, N, p) or (T, B, N, p), (T, p), (T, p) -> (T, B, N, p), not yet rounded to the dtype of tokens."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return tokens.to(wide) * weight.to(wide)[:, None, None] + bias.to(wide)[:, None, None]
