"""Find the transformer blocks of a backbone, their widths, and the tokens among a block's arguments."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .wrappers import resolve

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class BlockError(ValueError):
    """A block whose tokens cannot be read. The message names it and, unless ``named``, says how to leave it out."""

    named = False
    """Whether somebody chose the blocks, rather than ``find_blocks``."""

    def __str__(self) -> str:
        if self.named:
            return super().__str__()
        hint = "Name the blocks that count to leave others out, for example dtme.analyze(..., blocks='encoder.layers')"
        return f"{super().__str__()}. {hint}"


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
            raise ValueError(f"blocks={blocks!r} is not a module of {type(backbone).__name__}{_meant(blocks, modules)}")
        return {f"{blocks}.{name}": child for name, child in modules[blocks].named_children()} or {
            blocks: modules[blocks]
        }
    if not isinstance(blocks, (Sequence, nn.ModuleList, nn.Sequential)):
        raise TypeError(f"blocks must be None, a path, or a sequence of names or modules, got {type(blocks).__name__}")
    names = {id(module): name for name, module in modules.items()}
    wanted = [block if isinstance(block, str) else names.get(id(block)) for block in blocks]
    meant = resolve([name for name in wanted if name is not None], modules)
    wanted = [meant.get(name or "", name) for name in wanted]
    for block, name in zip(blocks, wanted, strict=True):
        if name not in modules:
            shown = repr(block) if isinstance(block, str) else type(block).__name__
            hint = _meant(block, modules) if isinstance(block, str) else ""
            raise ValueError(f"blocks names {shown}, which is not a module of {type(backbone).__name__}{hint}")
    if not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(f"blocks must name one or more different blocks, got {wanted}")
    return {name: modules[name] for name in wanted if name is not None}


def _meant(name: str, modules: Mapping[str, nn.Module]) -> str:
    """What somebody may have meant whose names begin at another module."""
    last = name.rpartition(".")[2]
    like = next((known for known in modules if known.rpartition(".")[2] == last), None)
    return "" if like is None else f"; did you mean {like!r}?"


def check_batch_first(blocks: Mapping[str, nn.Module]) -> None:
    """Rows must be images: blocks that take (N, B, p) would have their tasks mixed up."""
    for name, block in blocks.items():
        if any(isinstance(module, nn.MultiheadAttention) and not module.batch_first for module in block.modules()):
            raise BlockError(f"block {name!r} takes its tokens sequence first: build it with batch_first=True")


def _detect(backbone: nn.Module) -> dict[str, nn.Module]:
    """Layers by transformers' base class or by their children's names: the innermost that hold an attention.

    Audio models' convolutions are of that base class too, and so are whole stages of hierarchical models.
    """
    modules = dict(backbone.named_modules())
    layers = {n: m for n, m in modules.items() if _is_checkpointing_layer(m) and _holds_attention(m)}
    around = [f"{name}." if name else "" for name in layers] or [""]  # a pooling head has such children as well
    layers |= {n: m for n, m in modules.items() if n.startswith(tuple(around)) and _has_attention_and_mlp(m)}
    inner = {id(module) for module in layers.values()}
    return {
        name: module
        for name, module in modules.items()
        if name in layers and not any(id(child) in inner for child in module.modules() if child is not module)
    }


def _is_checkpointing_layer(module: nn.Module) -> bool:
    """transformers' base class of every layer, told by name: transformers itself is never imported here."""
    return any(
        base.__name__ == "GradientCheckpointingLayer" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def _holds_attention(module: nn.Module) -> bool:
    names = [f"{name.rpartition('.')[2]} {type(child).__name__}" for name, child in module.named_modules() if name]
    return any("attention" in name.lower() or "attn" in name.lower() for name in names)


def _has_attention_and_mlp(module: nn.Module) -> bool:
    """The children of timm's blocks, torchvision's and torch's encoder layers, and transformers' hierarchical ones."""
    names = [name for name, child in module.named_children() if not isinstance(child, (nn.Dropout, nn.Identity))]
    attention = any(name.startswith("attn") or name in _ATTENTIONS for name in names)
    return attention and any(name.startswith(("mlp", "ff")) or name in _FEED_FORWARDS for name in names)


_ATTENTIONS = ("self_attn", "self_attention", "self_att", "attention", "multi_head_attention")
_FEED_FORWARDS = ("linear1", "fc1", "intermediate", "feed_forward")


_NEVER_BLOCKS = ("torch.nn.", "timm.layers.")


def check_blocks(modules: Mapping[str, nn.Module], planned: Sequence[str], recognised: Mapping[str, nn.Module]) -> None:
    """Refuse plans about modules that are no blocks.

    A block is what a plan's report calls one, or what ``find_blocks`` recognises. Neither may lie inside another of
    them, nor around one, or its tokens would be modulated twice in one place; and a lone layer of torch's or timm's, a
    norm say, is a part of a block wherever it lies.

    Args:
        modules: all modules of the backbone by name.
        planned: names out of the plan.
        recognised: all blocks that are known otherwise.

    Raises:
        ValueError: names the module that is no block.
    """
    everything = dict.fromkeys([*planned, *recognised])
    for name in sorted(planned, key=lambda name: name in recognised):  # what is least likely a block first
        module = modules[name]
        around = [other for other in everything if other.startswith(f"{name}." if name else "") and other != name]
        inside = [other for other in everything if name.startswith(f"{other}.")]
        lone = next(module.children(), None) is None and type(module).__module__.startswith(_NEVER_BLOCKS)
        if around or not name:
            problem = f"holds the block {around[0]!r}" if around else "is the whole backbone"
        elif inside:
            problem = f"is a part of block {inside[0]!r}"
        elif lone or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            problem = f"is a {type(module).__name__}"
        else:
            continue
        raise ValueError(f"plan names {name!r} as a block, but that {problem}: name the blocks themselves")


def module_like(block: nn.Module) -> Tensor:
    """A plain floating scalar of the dtype that ``block`` computes in and on its device, whatever its weights are.

    Quantised weights are integers, floats of eight bits or subclasses of Tensor; norms and biases beside them are not.
    """
    floating = [p for p in block.parameters() if p.is_floating_point() and p.dtype.itemsize >= 2]
    plain = [p for p in floating if type(p) in (nn.Parameter, Tensor)]
    for parameter in (*plain, *floating):
        return torch.zeros((), dtype=parameter.dtype, device=parameter.device)
    device = next((tensor.device for tensor in (*block.parameters(), *block.buffers())), None)
    return torch.zeros((), device=device)


def block_widths(block: nn.Module) -> list[int]:
    """Channels that norms and linear layers of the block take, the likeliest width of its tokens first.

    Those are the block's own norms'; a linear layer may belong to a position bias, and a norm inside the attention to
    one head.
    """
    widths = (getattr(m, "in_features", None) for m in block.modules())
    linear = [width for width in widths if isinstance(width, int)]
    return _norm_widths(block.children()) + linear + _norm_widths(block.modules())


def _norm_widths(modules: Iterable[nn.Module]) -> list[int]:
    weights = [getattr(m, "weight", None) for m in modules if "norm" in type(m).__name__.lower()]
    return [w.shape[0] for w in weights if isinstance(w, Tensor) and w.ndim == 1]


def find_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any], block: str) -> tuple[int | str, Tensor]:
    """Where the tokens are among a block's arguments, and the tokens: the first floating (B, ..., p)."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for where, value in named:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3:
            return where, value
    raise BlockError(f"block {block!r} was called without tokens: none of its arguments is a floating (B, ..., p)")


def holds_channels_first(block: nn.Module, tokens: Tensor, num_features: int | None = None) -> bool:
    """Whether ``tokens`` are maps (B, p, H, W) rather than (B, ..., p), by the widths that the block's layers have."""
    if tokens.ndim != 4:
        return False
    widths, width, channels = [num_features] if num_features else block_widths(block), tokens.shape[-1], tokens.shape[1]
    convolved = [module.in_channels for module in block.modules() if isinstance(module, nn.Conv2d)]
    if channels in widths:
        return width not in widths or (bool(convolved) and width == channels)
    return channels in convolved and width not in widths


def channels_last(block: nn.Module, name: str, tokens: Tensor, num_features: int | None) -> Tensor:
    """What enters a block, as (B, ..., p): maps (B, p, H, W) with their channels moved, anything else itself.

    Args:
        num_features: p, where it is known.

    Raises:
        ValueError: tokens of another width than the block was expanded for; it names the block.
    """
    moved = tokens.movedim(1, -1) if holds_channels_first(block, tokens, num_features) else tokens
    if num_features and moved.shape[-1] != num_features:
        raise ValueError(
            f"block {name!r} ({type(block).__name__}) got tokens {tuple(tokens.shape)}, none of whose axes that may be "
            f"channels has the {num_features} that it was expanded for"
        )
    return moved


def replace_argument(args: tuple[Any, ...], kwargs: dict[str, Any], where: int | str, value: Any) -> Arguments:
    if isinstance(where, int):
        return (*args[:where], value, *args[where + 1 :]), kwargs
    return args, {**kwargs, where: value}
