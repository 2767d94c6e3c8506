"""Which attention of a block task tokens can join, and what feeds it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks import Arguments, find_tokens, module_like
from ..randomness import left_as_it_was
from ..seams import GenericSeam, NotExpandable, Seam, class_of, declared_norm, plain_attention, seam_of
from ..seams.catch import Catch
from ..seams.caught import Caught
from .calls import BlockCall, block_calls, unseen
from .trial import check_block, check_copy, check_keys, check_seam, check_weights, learning_ones


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
    """Whether the norm reads the block's own tokens, and the attention what it puts out, as it is."""
    is_direct: bool = False
    """Whether the attention reads just that, or its tokens, and not a rearrangement of them."""
    arguments: Arguments | None = None
    """What the attention is given while the block is tried."""
    learning: tuple[nn.Module, ...] = ()
    """Norm and attention, if they compute something else after they have run in training."""


def find_attention(name: str, block: nn.Module, num_features: int) -> Site:
    """The one attention of ``block`` and what feeds it.

    A library's file knows the library's attentions. Any other is known by what it does: the block runs on random
    tokens, and what attends then is the innermost module that makes queries, keys and values of the block's own tokens.
    What arrives there must be the very tokens that went in, the output of one of the block's modules that read them, or
    either of those rearranged, in windows say: anything else in between could not be repeated for the task tokens.
    What is found is then tried on random tokens, against the definition where the block can run it (``trial``).

    Raises:
        NotExpandable: names the block and says what is in the way.
    """
    title = f"block {name!r} ({type(block).__name__})"
    # without a graph, which some quantised layers cannot make in evaluation mode
    with torch.inference_mode(False), torch.no_grad(), left_as_it_was(block), unseen(block):
        seam = _known_seam(name, title, block)
        try:
            return _tried(name, title, block, seam, num_features)
        except NotExpandable:
            if seam is None:
                raise
            try:  # what a library's file knows may be of another release, or of another attention of its kind
                return _tried(name, title, block, None, num_features)
            except NotExpandable:
                pass
            raise


def _tried(name: str, title: str, block: nn.Module, seam: Seam | None, num_features: int) -> Site:
    """The site, tried on random tokens; with the seam of a library's file, or by what the block does."""
    like = module_like(block)
    declared, norm = declared_norm(block)
    if declared and seam is not None:
        site = Site(seam, norm, is_pre_norm=norm is not None)
        check_seam(site, title, num_features, like)
        return replace(site, learning=learning_ones(site, num_features, like))
    site, call = _find_site(name, title, block, seam, num_features, like)
    check_seam(site, title, num_features, like)
    check_weights(site, title, block, call)
    if check_block(site, title, block, call):
        check_copy(site, title, block, call)
    else:
        check_keys(site, title, block, call)
    return replace(site, arguments=None, learning=learning_ones(site, num_features, like))


# --- which attention --------------------------------------------------------------------------------------------------


def _known_seam(name: str, title: str, block: nn.Module) -> Seam | None:
    """The seam of the one attention that a library's file knows; None where it knows none of the block's modules."""
    kinds = {path: (module, kind) for path, module in block.named_modules() if (kind := seam_of(module))}
    kinds = {path: kinds[path] for path in _of_own_tokens(kinds)}
    if not kinds:
        return None
    if len(kinds) != 1:
        raise NotExpandable(_several(title, [module for module, _ in kinds.values()]))
    ((attention, kind),) = kinds.values()
    if isinstance(kind, str):
        raise NotExpandable(f"{title} cannot take task tokens: {kind}; modulate it instead")
    return kind(name, attention)


def _several(title: str, modules: list[nn.Module]) -> str:
    listed = ", ".join(type(module).__name__ for module in modules) or "none"
    return f"{title} must hold one attention that task tokens can join, found {listed}"


_CROSS_ATTENTION = ("cross", "encoder_attn", "encdec", "enc_attn", "encoder_decoder", "multihead_attn")


def _of_own_tokens(paths: Any) -> list[str]:
    """A decoder's block also attends to an encoder, whose tokens are not its own: that stays as it is.

    Told by the names that transformers, torch and timm give it.
    """
    own = [path for path in paths if not any(name in path.lower() for name in _CROSS_ATTENTION)]
    return own if len(own) == 1 else list(paths)


_NONE_FOUND = (
    ". Attention is seen where it calls scaled_dot_product_attention or dtme.attention(query, key, value, ...), or is "
    "written out as the softmax of q kᵀ · scale + bias, times v. Modulate the block instead, and leave it out of the "
    "plan's expansion"
)
_UNKNOWN = (
    "{title} cannot take task tokens: {what!r} is done to its scores or weights, and between q kᵀ and the product with "
    "v only scales, biases, masks, a softmax over the keys and dropout are known. Modulate the block instead, and "
    "leave it out of the plan's expansion; where plain attention will do, call dtme.attention(query, key, value, ...)"
)


def _attending(name: str, title: str, block: nn.Module, call: BlockCall) -> list[nn.Module]:
    """The modules inside of which the block attended, innermost first.

    Raises:
        NotExpandable: it did not attend, or several times.
    """
    names = {module: name for name, module in block.named_modules()}
    inside: list[nn.Module] = []
    times: list[list[nn.Module]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor | None, *args: Any, **options: Any) -> Tensor:
        if value is not None:
            times.append(list(inside))
        return plain_attention(query, key, value, *args, **options)

    def enter(module: nn.Module, args: Any) -> None:
        inside.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    hooks = [module.register_forward_pre_hook(enter) for module in block.modules()]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in block.modules()]
    caught = Caught(attend, call.rows, name)
    try:
        with Catch(caught):
            call.run(block)
    finally:
        for hook in hooks:
            hook.remove()
    innermost = {names[modules[-1]]: modules for modules in times}
    chosen = _of_own_tokens(innermost)
    if not chosen and caught.read:
        raise NotExpandable(_UNKNOWN.format(title=title, what=caught.read[0]))
    if len(chosen) != 1:
        raise NotExpandable(_several(title, [modules[-1] for modules in times]) + ("" if times else _NONE_FOUND))
    if (count := sum(names[modules[-1]] == chosen[0] for modules in times)) > 1:
        kind = type(innermost[chosen[0]][-1]).__name__
        raise NotExpandable(
            f"{title}: its {kind} attends {count} times, where task tokens join once; modulate it instead"
        )
    return innermost[chosen[0]][::-1]


# --- what feeds it ----------------------------------------------------------------------------------------------------


def _find_site(
    name: str, title: str, block: nn.Module, seam: Seam | None, num_features: int, like: Tensor
) -> tuple[Site, BlockCall]:
    """The site, and the call of the block that it was found by: the first kind of call that the block takes."""
    problem: Exception | None = None
    for call in block_calls(block, num_features, like):
        try:
            attending = [seam.attention] if seam is not None else _attending(name, title, block, call)
            found = _probe(block, attending[0], call)
        except NotExpandable:
            raise
        except Exception as error:  # whatever a block raises that takes other tokens
            problem = problem or error
            continue
        if seam is not None:
            return _site(title, seam, call, found), call
        return _generic_site(name, title, block, attending, call), call
    raise NotExpandable(f"{title} does not run on plain (B, N, p) tokens: {problem}") from problem


def _generic_site(name: str, title: str, block: nn.Module, attending: list[nn.Module], call: BlockCall) -> Site:
    """The innermost of the modules around an attention that makes it of the block's own tokens."""
    problem: NotExpandable | None = None
    kind = type(attending[0])
    alike = _of_own_tokens([path for path, module in block.named_modules() if type(module) is kind])
    if len(alike) > 1 and attending[0] is not block:
        raise NotExpandable(_several(title, [block.get_submodule(path) for path in alike]))
    for module in attending:
        if "forward" in vars(module):
            continue  # somebody else has replaced it: nothing is known about what runs
        found = _probe(block, module, call)
        try:
            seam = GenericSeam(name, module)
            site = _site(title, seam, call, found)
            seam.learn(*found.arguments)
            seam.keys_values(call.tokens[:1, :2])
        except NotExpandable as error:
            problem = problem or error
        except Exception as error:  # whatever a module raises that was not made for task tokens
            problem = problem or NotExpandable(f"{title} cannot take task tokens: {error}")
        else:
            return site
    raise problem or NotExpandable(_several(title, []))


class _Probed(NamedTuple):
    """What arrived at an attention."""

    arguments: Arguments
    tokens: Any
    outputs: list[tuple[nn.Module, Any, Any]]
    """Of every module that ran before it: itself, what it read, what it put out."""


def _site(title: str, seam: Seam, call: BlockCall, found: _Probed) -> Site:
    arrived, tokens = found.tokens, call.tokens
    if arrived is tokens:
        return Site(seam, None, is_direct=True, arguments=found.arguments)
    for module, read, output in found.outputs:
        if output is arrived and read is tokens:
            return Site(seam, module, is_pre_norm=True, is_direct=True, arguments=found.arguments)
    if any(output is arrived for _, _, output in found.outputs):
        raise NotExpandable(
            f"{title}: other layers change its tokens before the norm of its attention, which task tokens do not pass; "
            "modulate it instead"
        )
    # the last that read them first: an identity before it would put out the block's tokens as well
    for module, read, output in [*reversed(found.outputs), (None, tokens, tokens)]:
        if read is tokens and _holds_the_same(output, arrived):
            return Site(seam, module, arguments=found.arguments)
    raise NotExpandable(
        f"{title}: its {type(seam.attention).__name__} does not read the block's (normalised) tokens directly"
    )


def _holds_the_same(output: Any, arrived: Any) -> bool:
    """Whether all of the tokens that arrived are among those that were put out, or padding."""
    if not isinstance(output, Tensor) or not isinstance(arrived, Tensor) or output.is_meta or arrived.ndim != 3:
        return False
    if output.shape[-1] != arrived.shape[-1] or output.dtype != arrived.dtype:
        return False
    known, new = (
        {row.numpy().tobytes() for row in x.detach().cpu().flatten(0, -2).contiguous().view(torch.uint8)}
        for x in (output, arrived)
    )
    return new - known <= {bytes(arrived.shape[-1] * arrived.element_size())}


class _Reached(Exception):
    """Stops a probing call once the attention's input is known."""


@contextmanager
def _watched(modules: list[nn.Module], hook: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _probe(block: nn.Module, attention: nn.Module, call: BlockCall) -> _Probed:
    """Run the block up to its attention."""
    arrived: list[_Probed] = []
    outputs: list[tuple[nn.Module, Any, Any]] = []

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs.append((module, next(iter([*args, *kwargs.values()]), None), output))

    def reach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived.append(_Probed((args, kwargs), find_tokens(args, kwargs, "")[1], outputs))
        raise _Reached

    handle = attention.register_forward_pre_hook(reach, with_kwargs=True)
    try:
        with _watched([module for module in block.modules() if module is not attention], remember):
            call.run(block)
    except _Reached:
        pass
    finally:
        handle.remove()
    return arrived[0] if arrived else _Probed(((), {}), None, outputs)
