"""The naive way to run one task: plain hooks on a backbone that was never expanded."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .subject import Subject

Added = dict[str, Tensor]


class NoOracle(Exception):
    """Why a model's task tokens cannot be computed independently."""


def tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor] | None:
    """Where a block's tokens are: its first floating tensor of three dimensions or more."""
    for where, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3:
            return where, value
    return None


def with_tokens(
    args: tuple[Any, ...], kwargs: dict[str, Any], where: int | str, x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(where, int):
        return (*args[:where], x, *args[where + 1 :]), kwargs
    return args, {**kwargs, where: x}


def channels_first(block: nn.Module, x: Tensor) -> bool:
    """Whether ``x`` is (B, p, H, W): its block begins with something that reads channels there."""
    if x.ndim != 4:
        return False
    for module in block.modules():
        size = getattr(module, "in_channels", None) or getattr(module, "num_features", None)
        if isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
            return size is None or size == x.shape[1]
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            shape = module.in_features if isinstance(module, nn.Linear) else module.normalized_shape[-1]
            return shape != x.shape[-1] and shape == x.shape[1]
    return False


@contextmanager
def modulated(backbone: nn.Module, added: Added, task: str) -> Iterator[None]:
    """x * w + b on the tokens of every block that has a modulation of this task, every time that it runs."""
    handles = []
    for name, block in backbone.named_modules():
        if (weight := added.get(f"{name}.dtme.weight.{task}")) is None:
            continue

        def enter(block, args, kwargs, weight=weight, bias=added[f"{name}.dtme.bias.{task}"]):
            where, x = tokens_of(args, kwargs)
            shape = (-1, 1, 1) if channels_first(block, x) else (-1,)
            return with_tokens(args, kwargs, where, x * weight.view(shape) + bias.view(shape))

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class KeysValues:
    """What a block's attention makes of task tokens: which of its calls they join, and their keys and values."""

    call: int
    key: Tensor
    value: Tensor
    turned: bool
    """Whether keys depend on the position, by a rotation that leaves the first as it is."""


class _Attentions:
    """Counts calls of scaled_dot_product_attention; keeps their keys and values, or adds those of task tokens.

    torch's function is replaced while it is entered: a TorchFunctionMode does not see calls inside of
    ``multi_head_attention_forward``.
    """

    def __init__(self, extra: KeysValues | None = None) -> None:
        self.extra, self.count = extra, 0
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> "_Attentions":
        self.original = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self.attend  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        F.scaled_dot_product_attention = self.original  # type: ignore[assignment]

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self.count += 1
        if self.extra is None:
            self.seen.append((given["key"].detach().clone(), given["value"].detach().clone()))
        elif self.count - 1 == self.extra.call:
            given = _joined(given, self.extra)
        return self.original(**given)


def _joined(given: dict[str, Any], extra: KeysValues) -> dict[str, Any]:
    """The same call with task keys and values behind the others, which every query sees."""
    query, key, value = given["query"], given["key"], given["value"]
    count = extra.key.shape[-2]
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], key.shape[-2])
        mask = F.pad(mask, (0, count), value=True if mask.dtype == torch.bool else 0.0)
    # without a mask transformers leaves it to torch to repeat the heads of keys; else it repeats them itself
    key = torch.cat([key, _spread(extra.key, key)], -2)
    value = torch.cat([value, _spread(extra.value, value)], -2)
    return {**given, "key": key, "value": value, "attn_mask": mask, "is_causal": False}


def _spread(extra: Tensor, like: Tensor) -> Tensor:
    """Task keys for every row, and with as many heads: each repeated, or one out of every group of equal ones."""
    if like.ndim == 4 and extra.shape[1] > like.shape[1]:
        extra = extra[:, :: extra.shape[1] // like.shape[1]]
    elif like.ndim == 4 and extra.shape[1] < like.shape[1]:
        extra = extra.repeat_interleave(like.shape[1] // extra.shape[1], 1)
    return extra.to(like).expand(*like.shape[:-2], *extra.shape[-2:])


def keys_values(subject: Subject, backbone: nn.Module, name: str, tokens: Tensor) -> KeysValues:
    """Put each task token in the place of a block's first token and see which key and value change.

    A token's key is what the block's own norm and projections make of it, whatever their layout; at the first place
    rotary embeddings leave it as it is.
    """
    block = backbone.get_submodule(name)
    call = _first_call(subject, backbone, block)
    first = [_replaced(block, *call, token, 0) for token in tokens]
    second = [_replaced(block, *call, token, 1) for token in tokens]
    if len({entry[0] for entry in first}) != 1:
        raise NoOracle("task tokens reach different attentions")
    key = torch.cat([entry[1] for entry in first], -2)
    value = torch.cat([entry[2] for entry in first], -2)
    elsewhere = torch.cat([entry[1] for entry in second], -2)
    close = _close(key, elsewhere)
    if not close and not _close(key.norm(dim=-1), elsewhere.norm(dim=-1)):
        raise NoOracle("keys depend on the position of their token, and not by a rotation")
    if not close and _begins_turned(call[1], tokens_of(*call)):
        raise NoOracle("positions do not begin at zero: no key is as it is without them")
    return KeysValues(first[0][0], key, value, not close)


def _begins_turned(kwargs: dict[str, Any], tokens: tuple[int | str, Tensor] | None) -> bool:
    """Whether rotary embeddings for all tokens (not patches alone) turn the first, as those that count from one do."""
    rotary = kwargs.get("position_embeddings")
    if not isinstance(rotary, tuple) or len(rotary) != 2 or not isinstance(rotary[1], Tensor) or tokens is None:
        return False
    sine = rotary[1]
    return sine.ndim > 1 and sine.shape[-2] == tokens[1].shape[1] and bool(sine[..., 0, :].abs().max() > 1e-6)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max().clamp_min(1e-12))


def _first_call(subject: Subject, backbone: nn.Module, block: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        subject.call(backbone, subject.inputs(1))
    finally:
        hook.remove()
    return calls[0]


def _replaced(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], token: Tensor, place: int
) -> tuple[int, Tensor, Tensor]:
    """Which attention sees ``token`` in the given place, and its key and value there, (1, H, 1, d)."""
    where, x = tokens_of(args, kwargs)  # type: ignore[misc]
    changed = x.clone()
    if x.ndim == 3:
        changed[:, place] = token
    elif channels_first(block, x):
        changed[:, :, 0, place] = token
    else:
        changed[:, 0, place] = token
    runs = []
    for tensor in (x, changed):
        with _Attentions() as attentions:
            block(*with_tokens(args, kwargs, where, tensor)[0], **with_tokens(args, kwargs, where, tensor)[1])
        runs.append(attentions.seen)
    if len(runs[0]) != len(runs[1]) or not runs[0]:
        raise NoOracle("its attention does not call scaled_dot_product_attention")
    moved = [i for i, (a, b) in enumerate(zip(*runs, strict=True)) if a[0].shape != b[0].shape or (a[0] != b[0]).any()]
    if len(moved) != 1:
        raise NoOracle(f"{len(moved)} of a block's attentions read its tokens")
    (old, _), (key, value) = runs[0][moved[0]], runs[1][moved[0]]
    index = _place(key != old)
    return moved[0], key[index], value[index]


def _place(different: Tensor) -> tuple[slice, ...]:
    """The one place (..., M) in which keys (..., M, d) differ, with all heads: (1, H, 1, d) of (B, H, M, d)."""
    places = different.any(-1).nonzero()
    extent = [column.unique() for column in places.T]
    heads = [i for i, values in enumerate(extent[:-1]) if len(values) > 1]
    all_heads = len(heads) <= 1 and all(len(extent[i]) == different.shape[i] for i in heads)
    if len(extent[-1]) != 1 or not all_heads or (different.ndim < 4 and heads):
        raise NoOracle(f"one token is read by {len(places)} keys")
    return tuple(slice(None) if i in heads else slice(int(v[0]), int(v[0]) + 1) for i, v in enumerate(extent))


def let_torch_attend(backbone: nn.Module) -> Callable[[], None]:
    """Switch attention that is written out to torch's own, where the library has both; returns how to undo it."""
    switched: list[tuple[Any, str, Any]] = []
    for module in backbone.modules():
        if getattr(module, "fused_attn", None) is False:  # timm's
            switched.append((module, "fused_attn", False))
            module.fused_attn = True
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "eager":  # transformers'
            switched.append((config, "_attn_implementation", "eager"))
            config._attn_implementation = "sdpa"  # type: ignore[union-attr]
    return lambda: [setattr(*entry) for entry in switched] and None


@contextmanager
def joined(backbone: nn.Module, extra: dict[str, KeysValues]) -> Iterator[None]:
    """Task keys and values in the attention of every block that is named, every time that it runs."""
    stacks: list[ExitStack] = []
    handles = []
    for name, keys in extra.items():
        block = backbone.get_submodule(name)

        def enter(block, args, keys=keys):
            stacks.append(ExitStack())
            stacks[-1].enter_context(_Attentions(keys))

        def leave(block, args, output):
            stacks.pop().close()

        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        while stacks:
            stacks.pop().close()
        for handle in handles:
            handle.remove()


@contextmanager
def concatenated(backbone: nn.Module, added: Added, task: str) -> Iterator[None]:
    """The definition: append the task's tokens to the block's, run it, drop them."""
    handles = []
    for name, block in backbone.named_modules():
        if (tokens := added.get(f"{name}.dtme.tokens.{task}")) is None:
            continue

        def enter(block, args, kwargs, tokens=tokens):
            where, x = tokens_of(args, kwargs)
            if x.ndim != 3:
                raise NoOracle("tokens are not (B, N, p)")
            return with_tokens(args, kwargs, where, torch.cat([x, tokens.expand(len(x), -1, -1)], 1))

        def leave(block, args, output, tokens=tokens):
            if isinstance(output, tuple):
                return (output[0][:, : output[0].shape[1] - len(tokens)], *output[1:])
            return output[:, : output.shape[1] - len(tokens)]

        handles += [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
