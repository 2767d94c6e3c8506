"""Plain pre-norm blocks run their first half, from modulation to attention, in one operation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dtme_kernels

from ..seams import Projection, Seam, is_hooked
from ..torch_private import saved_tensors_hooks
from .site import Site, is_layer_norm


class FirstHalf(NamedTuple):
    """What a plain block's first half makes of its input, (T * B, N, p) each; it waits until norm and attention ask."""

    modulated: Tensor
    normalized: Tensor
    attended: Tensor
    finish: Callable[[Tensor], Any]
    """What the attention makes of ``attended``."""
    context: tuple[Any, ...]

    def is_of(self, tokens: Any) -> bool:
        """Whether the norm, asked for ``tokens``, is asked for what is here."""
        return tokens is self.modulated and self.context == _context()

    def is_of_norm(self, normalized: Any) -> bool:
        return normalized is self.normalized and self.context == _context()


def _context() -> tuple[Any, ...]:
    """Whether gradients are wanted, and who saves tensors for them: what checkpointing a part of a block changes.

    A part that is run again must have been run, not found done.
    """
    if torch.compiler.is_compiling():
        return ()
    return torch.is_grad_enabled(), saved_tensors_hooks()


@dataclass(frozen=True)
class PlainNorm:
    """A layer norm of the block's own tokens, and the attention that reads it."""

    norm: Any
    seam: Seam

    @classmethod
    def of(cls, site: Site) -> "PlainNorm | None":
        plain = site.is_pre_norm and is_layer_norm(site.norm) and "forward" not in vars(site.norm)
        return cls(site.norm, site.seam) if plain else None

    def projection(self, block: nn.Module) -> Projection | None:
        """What this forward's first half can be run with at once.

        That is where the attention is nothing but projections and nobody is looking in between: a hook may want the
        gradients of all that the block does with its input, and transformers' checkpointing runs the block again from
        there.
        """
        if is_hooked(block, 1, 1) or getattr(block, "gradient_checkpointing", False):
            return None
        return None if is_hooked(self.norm, 1, 1) or is_hooked(self.seam.attention) else self.seam.projection()

    def run(
        self, projection: Projection, streams: Tensor, weight: Tensor, bias: Tensor, task_tokens: Tensor
    ) -> FirstHalf:
        """Tokens (B, N, p), shared, or (T, B, N, p); maps (T, p); task tokens (T, t, p)."""
        norm = self.norm
        attended, modulated, normalized = dtme_kernels.modulate_concat_attention(
            streams,
            weight,
            bias,
            task_tokens,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            qkv_weight=projection.weight,
            qkv_bias=projection.bias,
            num_heads=projection.num_heads,
            eps=norm.eps,
            scale=projection.scale,
            return_normalized=True,
        )
        modulated, normalized, attended = (x.flatten(0, 1) for x in (modulated, normalized, attended))
        return FirstHalf(modulated, normalized, attended, projection.finish, _context())
