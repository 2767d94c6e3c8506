"""Which attention of a block task tokens can join, and what feeds it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..blocks import find_tokens, module_like
from ..randomness import left_as_it_was
from ..seams import NotExpandable, Seam, class_of, declared_norm, seam_of
from .trial import block_options, check_block, check_copy, check_seam, check_weights, unseen


def is_layer_norm(module: Any) -> bool:
    """Of the channels, with a weight and a bias."""
    if class_of(module) != ("timm.layers.norm", "LayerNorm") and type(module) is not nn.LayerNorm:
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
    very output of one of the block's modules that read them: anything in between could not be repeated for the task
    tokens. Blocks that rearrange their tokens first, in windows, are declared in their library's file instead. What is
    found is then tried on random tokens, against the definition where the block can run it (``trial``).

    Raises:
        NotExpandable: names the block and says what is in the way.
    """
    title = f"block {name!r} ({type(block).__name__})"
    seam = _seam(name, title, block)
    like = module_like(block)
    declared, norm = declared_norm(block)
    with left_as_it_was(block):
        if declared:
            site = Site(seam, norm, is_pre_norm=norm is not None)
        else:
            site = _find_site(title, block, seam, like.new_zeros(1, 2, num_features))
        with unseen(block):
            check_seam(site, title, num_features, like)
            if not declared:
                check_weights(site, title, block, num_features, like)
                check_block(site, title, block, num_features, like)
                check_copy(site, title, block, num_features, like)
    return site


def _seam(name: str, title: str, block: nn.Module) -> Seam:
    kinds = {path: (module, kind) for path, module in block.named_modules() if (kind := seam_of(module))}
    own = [path for path in kinds if not _is_cross_attention(path)]
    # a decoder's block also attends to an encoder, whose tokens are not its own: that stays as it is
    kinds = {path: kinds[path] for path in (own if len(own) == 1 else kinds)}
    if len(kinds) != 1:
        listed = ", ".join(type(module).__name__ for module, _ in kinds.values()) or "none"
        raise NotExpandable(f"{title} must hold one attention that task tokens can join, found {listed}")
    ((attention, kind),) = kinds.values()
    if isinstance(kind, str):
        raise NotExpandable(f"{title} cannot take task tokens: {kind}; modulate it instead")
    return kind(name, attention)


_CROSS_ATTENTION = ("cross", "encoder_attn", "encdec", "enc_attn", "encoder_decoder", "multihead_attn")


def _is_cross_attention(path: str) -> bool:
    """By the names that transformers, torch and timm give it."""
    return any(name in path.lower() for name in _CROSS_ATTENTION)


def _find_site(title: str, block: nn.Module, seam: Seam, tokens: Tensor) -> Site:
    try:
        arrived, outputs = _probe(block, seam.attention, tokens)
    except Exception as error:
        raise NotExpandable(f"{title} does not run on plain (B, N, p) tokens: {error}") from error
    if arrived is tokens:
        return Site(seam, None)
    for module, read, output in outputs:
        if output is arrived and read is tokens:
            return Site(seam, module, is_pre_norm=True)
    if any(output is arrived for _, _, output in outputs):
        raise NotExpandable(
            f"{title}: other layers change its tokens before the norm of its attention, which task tokens do not pass; "
            "modulate it instead"
        )
    raise NotExpandable(f"{title}: its attention does not read the block's (normalised) tokens directly")


def _probe(
    block: nn.Module, attention: nn.Module, tokens: Tensor
) -> tuple[Tensor | None, list[tuple[nn.Module, Any, Any]]]:
    """What arrives at the attention, and what every module before it read and put out."""
    arrived: list[Tensor] = []
    outputs: list[tuple[nn.Module, Any, Any]] = []

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs.append((module, next(iter([*args, *kwargs.values()]), None), output))

    def reach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived.append(find_tokens(args, kwargs, "")[1])
        raise _Reached

    others = [module for module in block.modules() if module is not attention]
    hooks = [module.register_forward_hook(remember, with_kwargs=True) for module in others]
    hooks.append(attention.register_forward_pre_hook(reach, with_kwargs=True))
    try:
        block(tokens, **block_options(block, tokens))
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return arrived[0] if arrived else None, outputs
