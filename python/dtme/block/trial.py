"""Try task tokens in a block before it is expanded, on random numbers, and refuse what comes out otherwise.

Two things are compared. What ``run`` makes of an attention that a seam has written out, with what the installed release
of its library does. And task keys that join the attention, with the definition (method.md, section 4): the task tokens
stand beside the block's own, the block runs on all of them, and their outputs are dropped. A block that cannot run
alone, or not on another number of tokens, tells nothing by that and is not refused for it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..seams import NotExpandable, Seam, no_positions, required_parameters
from ..seams.base import Attend
from ..trees import tensors
from .attention import attend_concatenated

if TYPE_CHECKING:
    from .site import Site


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def unseen(block: nn.Module) -> Iterator[None]:
    """Run ``block`` without a hook of anybody's being called: what is tried here is nobody's forward."""
    hooks = [(module, name, getattr(module, name)) for module in block.modules() for name in _HOOKS]
    try:
        for module, name, known in hooks:
            setattr(module, name, type(known)())
        yield
    finally:
        for module, name, known in hooks:
            setattr(module, name, known)


def block_options(block: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """What a block must be given beside its tokens: positions that change nothing, and None for a mask and the like."""
    options: dict[str, Any] = dict.fromkeys(required_parameters(block.forward))
    if "position_embeddings" in inspect.signature(block.forward).parameters:
        options["position_embeddings"] = no_positions(tokens)
    return options


def check_seam(site: Site, title: str, num_features: int, like: Tensor) -> None:
    """A seam must tell keys and values, and one that wrote a forward out must compute what the real forward does."""
    seam = site.seam
    with _installed(seam, F.scaled_dot_product_attention):
        seam.keys_values(_random(like, 1, 3, num_features))
        if not seam.written_out:
            return
        tokens = _random(like, 2, seam.num_tokens(), num_features)
        args = (tokens,) * (3 if isinstance(seam.attention, nn.MultiheadAttention) else 1)
        got = _first(seam.run(F.scaled_dot_product_attention, *args))
    want = _first(type(seam.attention).forward(seam.attention, *args))
    if not _close(got, want):
        raise NotExpandable(
            f"{title}: its {type(seam.attention).__name__} does not compute what that of the known releases does; "
            "modulate the block instead"
        )


def check_weights(site: Site, title: str, block: nn.Module, num_features: int, like: Tensor) -> None:
    """torch's attention weights, which task keys would change, must not reach the block's output."""
    attention = site.seam.attention
    if not isinstance(attention, nn.MultiheadAttention):
        return

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = type(attention).forward(attention, *args, **kwargs)
        return out, None if weights is None else torch.full_like(weights, torch.nan)

    output = _run(block, _random(like, 2, 5, num_features), site.seam, forward)
    if not like.is_meta and any(tensor.isnan().any() for tensor in tensors(output)):
        raise NotExpandable(
            f"{title} uses the weights that its nn.MultiheadAttention returns, which task tokens would change; "
            "modulate it instead"
        )


def check_block(site: Site, title: str, block: nn.Module, num_features: int, like: Tensor) -> None:
    """Task keys in the attention must give what concatenating the task tokens to the block's own gives."""
    tokens, task = _random(like, 2, 5, num_features), _random(like, 1, 3, num_features)
    with _installed(site.seam, F.scaled_dot_product_attention):
        task_kv = site.seam.keys_values(task if site.norm is None else site.norm(task))
    attend = partial(attend_concatenated, None, task_kv)
    got = _first(_run(block, tokens, site.seam, partial(site.seam.run, attend)))
    beside = task.expand(2, -1, -1)
    # among the tokens of a causal attention, only those behind the task tokens see them
    for order, shared in (((tokens, beside), slice(0, 5)), ((beside, tokens), slice(3, 8))):
        want = _first(_run(block, torch.cat(order, 1)))
        if not isinstance(want, Tensor) or want.shape != (2, 8, num_features):
            return
        if got is not None and _close(got, want[:, shared]):
            return
    raise NotExpandable(
        f"{title}: keys of task tokens in its attention would not be what task tokens beside its own tokens are "
        "(because of a bias by key, of positions, or of another layer that mixes tokens); modulate it instead"
    )


def check_copy(site: Site, title: str, block: nn.Module, num_features: int, like: Tensor) -> None:
    """The same in float32, where low precision would hide a difference of a percent; in a copy, if there can be one."""
    if like.dtype.itemsize >= 4:
        return
    names = {module: name for name, module in block.named_modules()}
    try:
        twin = copy.deepcopy(block).float()
        seam = type(site.seam)(site.seam.block, twin.get_submodule(names[site.seam.attention]))
        norm = None if site.norm is None else twin.get_submodule(names[site.norm])
        twin_site = replace(site, seam=seam, norm=norm)
        with _installed(seam, F.scaled_dot_product_attention):
            seam.keys_values(_random(like.float(), 1, 3, num_features))
    except Exception:
        return  # weights that cannot be copied or widened, quantised ones say, or no memory for them
    check_block(twin_site, title, twin, num_features, like.float())


@contextmanager
def _installed(seam: Seam, attend: Attend) -> Iterator[None]:
    seam.install(partial(seam.run, attend))
    try:
        yield
    finally:
        seam.remove()


def _run(
    block: nn.Module, tokens: Tensor, seam: Seam | None = None, forward: Callable[..., Any] | None = None
) -> Any | None:
    """The block on its own, with another forward of its attention; None where it does not run so."""
    handle = block.register_forward_hook(lambda *args: None)  # torch's fast path would not call the attention
    if seam is not None and forward is not None:
        seam.install(forward)
    try:
        return block(tokens, **block_options(block, tokens))
    except Exception:
        return None
    finally:
        handle.remove()
        if seam is not None:
            seam.remove()


def _first(output: Any) -> Any:
    """The tokens among what a block or an attention returns."""
    return next(iter(tensors(output)), None)


def _random(like: Tensor, *shape: int) -> Tensor:
    """The same numbers at every call with this shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(like)


def _close(got: Tensor, want: Tensor) -> bool:
    """Equal but for rounding, by root mean squares; tensors without numbers tell nothing."""
    if want.is_meta:
        return True
    # eager attention takes its softmax in float32 whatever its dtype is
    rounding = 1.5 * torch.finfo(want.dtype).eps if want.dtype.itemsize < 4 else 50 * torch.finfo(torch.float32).eps
    if want.dtype == torch.float32 and want.is_cuda and torch.get_float32_matmul_precision() != "highest":
        rounding = 1e-2
    error, size = ((x.double() if x.device.type != "mps" else x).square().mean().sqrt() for x in (got - want, want))
    return bool(error <= rounding * size)
