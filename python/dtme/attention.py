"""Which attention of a block task tokens can join, and what feeds it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import find_tokens
from .seams import NotExpandable, Seam, TransformersSeam, required_parameters, seam_class


def is_layer_norm(module: Any) -> bool:
    """Of the channels, with a weight and a bias."""
    timm = (type(module).__module__, type(module).__name__) == ("timm.layers.norm", "LayerNorm")
    if not timm and type(module) is not nn.LayerNorm:
        return False
    return len(module.normalized_shape) == 1 and module.weight is not None and module.bias is not None


@dataclass(frozen=True)
class Site:
    """Where task tokens enter a block: its attention, and the norm before it (None: it reads the block's tokens)."""

    seam: Seam
    norm: nn.Module | None
    is_pre_norm: bool = False
    """Whether the norm reads the block's own tokens."""


class _Reached(Exception):
    """Stops a probing call once the attention's input is known."""


def find_attention(name: str, block: nn.Module, num_features: int) -> Site:
    """The one attention of ``block`` and what feeds it.

    The block is called on zeros up to its attention. What arrives there must be the very tokens that went in, or the
    very output of one of the block's modules: anything in between could not be repeated for the task tokens.
    """
    title = f"block {name!r} ({type(block).__name__})"
    found = [(module, kind) for module in block.modules() if (kind := seam_class(module))]
    if len(found) != 1:
        kinds = ", ".join(type(module).__name__ for module, _ in found) or "none"
        raise NotExpandable(f"{title} must hold one attention that task tokens can join, found {kinds}")
    attention, kind = found[0]
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None) or "eager"
    if kind is TransformersSeam and implementation not in ("eager", "sdpa"):
        raise NotExpandable(
            f"{title} uses attn_implementation={implementation!r}, whose masks cannot be extended: load the model with "
            "attn_implementation='sdpa'"
        )
    parameter = next(p for p in block.parameters() if p.is_floating_point())
    tokens = torch.zeros(1, 2, num_features, dtype=parameter.dtype, device=parameter.device)
    try:
        arrived, outputs = _probe(block, attention, tokens)
    except Exception as error:
        raise NotExpandable(f"{title} does not run on plain (B, N, p) tokens: {error}") from error
    if arrived is tokens:
        return Site(kind(name, attention), None)
    for module, read, output in outputs:
        if output is arrived:
            return Site(kind(name, attention), module, is_pre_norm=read is tokens)
    raise NotExpandable(f"{title}: its attention does not read the block's (normalised) tokens directly")


def _probe(
    block: nn.Module, attention: nn.Module, tokens: Tensor
) -> tuple[Tensor | None, list[tuple[nn.Module, Any, Any]]]:
    """What arrives at the attention, and what every module before it read and put out; the block is left as it was."""
    arrived: list[Tensor] = []
    outputs: list[tuple[nn.Module, Any, Any]] = []

    def remember(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append((module, args[0] if args else None, output))

    def reach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived.append(find_tokens(args, kwargs, "")[1])
        raise _Reached

    training = {module: module.training for module in block.modules()}
    hooks = [module.register_forward_hook(remember) for module in block.modules() if module is not attention]
    hooks.append(attention.register_forward_pre_hook(reach, with_kwargs=True))
    try:
        block.eval()
        with torch.no_grad():
            block(tokens, **dict.fromkeys(required_parameters(block.forward)))  # a mask, say
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return arrived[0] if arrived else None, outputs
