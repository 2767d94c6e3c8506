"""Find the transformer blocks of a backbone, their widths, and the tokens among a block's arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def find_blocks(backbone: nn.Module, blocks: str | Sequence[str | nn.Module] | None = None) -> dict[str, nn.Module]:
    """The blocks of ``backbone`` by name, in the order they are registered.

    Args:
        backbone: any transformer.
        blocks: None finds them (transformers: the innermost checkpointing layers; timm and its like: modules with an
            ``attn*`` and an ``mlp*`` child); else the attribute path of their container (``"encoder.layers"``), or a
            sequence of names or modules.

    Raises:
        ValueError: nothing found, a name or module that ``backbone`` does not have or that is given twice, or a block
            whose tokens are not batch first.
    """
    found = _detect(backbone) if blocks is None else _named(backbone, blocks)
    if not found:
        raise ValueError(
            f"no transformer blocks were recognised in {type(backbone).__name__}: name them, for example "
            "blocks='encoder.layers'"
        )
    check_batch_first(found)
    return found


def _named(backbone: nn.Module, blocks: str | Sequence[str | nn.Module]) -> dict[str, nn.Module]:
    modules = {name: module for name, module in backbone.named_modules() if name}
    if isinstance(blocks, str):
        if blocks not in modules:
            raise ValueError(f"blocks={blocks!r} is not a module of {type(backbone).__name__}")
        return {f"{blocks}.{name}": child for name, child in modules[blocks].named_children()} or {
            blocks: modules[blocks]
        }
    if not isinstance(blocks, Sequence):
        raise TypeError(f"blocks must be None, a path, or a sequence of names or modules, got {type(blocks).__name__}")
    names = {id(module): name for name, module in modules.items()}
    wanted = [block if isinstance(block, str) else names.get(id(block)) for block in blocks]
    for block, name in zip(blocks, wanted, strict=True):
        if name not in modules:
            shown = repr(block) if isinstance(block, str) else type(block).__name__
            raise ValueError(f"blocks names {shown}, which is not a module of {type(backbone).__name__}")
    if not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(f"blocks must name one or more different blocks, got {wanted}")
    return {name: modules[name] for name in wanted if name is not None}


def check_batch_first(blocks: Mapping[str, nn.Module]) -> None:
    """Rows must be images: blocks that take (N, B, p) would have their tasks mixed up."""
    for name, block in blocks.items():
        if any(isinstance(module, nn.MultiheadAttention) and not module.batch_first for module in block.modules()):
            raise ValueError(f"block {name!r} takes its tokens sequence first: build it with batch_first=True")


def _detect(backbone: nn.Module) -> dict[str, nn.Module]:
    layers = {name: module for name, module in backbone.named_modules() if _is_checkpointing_layer(module)}
    innermost = {
        name: module
        for name, module in layers.items()
        if not any(_is_checkpointing_layer(child) for child in module.modules() if child is not module)
    }
    return innermost or {name: module for name, module in backbone.named_modules() if _has_attention_and_mlp(module)}


def _is_checkpointing_layer(module: nn.Module) -> bool:
    """transformers' base class of every layer, told by name: transformers itself is never imported here."""
    return any(
        base.__name__ == "GradientCheckpointingLayer" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def _has_attention_and_mlp(module: nn.Module) -> bool:
    """The children of timm's blocks, and of torchvision's and torch's own encoder layers."""
    names = [name for name, _ in module.named_children()]
    attention = any(name.startswith("attn") or name in ("self_attn", "self_attention") for name in names)
    return attention and any(name.startswith("mlp") or name == "linear1" for name in names)


def block_width(block: nn.Module) -> int | None:
    """Channels p of a block's tokens: those of its first norm or linear layer; None where it has neither."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1]
    return None


def find_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any], block: str) -> tuple[int | str, Tensor]:
    """Where the tokens are among a block's arguments, and the tokens: the first floating (B, ..., p)."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for where, value in named:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3:
            return where, value
    raise ValueError(
        f"block {block!r} was called without tokens: none of its arguments is a floating tensor (B, ..., p)"
    )


def replace_argument(args: tuple[Any, ...], kwargs: dict[str, Any], where: int | str, value: Any) -> Arguments:
    if isinstance(where, int):
        return (*args[:where], value, *args[where + 1 :]), kwargs
    return args, {**kwargs, where: value}
