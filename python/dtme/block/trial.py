"""Try task tokens in a block before it is expanded, on random numbers, and refuse what comes out otherwise.

Two things are compared. What ``run`` makes of an attention that a seam has written out, with what the installed release
of its library does. And task keys that join the attention, with the definition: the task tokens
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
from torch import Tensor, nn

from ..blocks import Arguments, find_tokens, replace_argument
from ..seams import GenericSeam, NotExpandable, Seam, plain_attention
from ..seams.base import Attend
from ..trees import map_tensors, tensors
from .attention import JoinedStreams, OwnTokens, attend, attend_concatenated
from .calls import BlockCall, random_like
from .statistics import learns

if TYPE_CHECKING:
    from .site import Site


MOST_TASK_TOKENS = 64
"""Places in which the keys of one task token are compared."""


def check_seam(site: Site, title: str, num_features: int, like: Tensor) -> None:
    """A seam must tell keys and values, and the attention must compute through it what it does without."""
    seam = site.seam
    try:
        with _installed(seam, plain_attention):
            seam.keys_values(random_like(like, 1, 3, num_features))
            tokens = random_like(like, 2, seam.num_tokens(), num_features)
            args, _ = _arguments(seam, tokens)
            got: Any = _first(seam.run(plain_attention, *args)) if seam.copied else None
    except (AttributeError, TypeError) as error:
        if not seam.copied:
            raise
        raise _differs(title, seam, f"what that of the known releases does ({error})") from error
    if isinstance(seam, GenericSeam):
        _check_generic(site, seam, title)
        everywhere = seam.keys_values(random_like(like, 1, 1, num_features).expand(-1, MOST_TASK_TOKENS, -1))
        if any(not _close(x, x[:, :, :1].expand_as(x)) for x in everywhere):
            raise _depends(title, type(seam.attention).__name__)
    elif seam.copied and not _close(got, _first(type(seam.attention).forward(seam.attention, *args))):
        raise _differs(title, seam, "what that of the known releases does")


def _differs(title: str, seam: Seam, what: str) -> NotExpandable:
    name = type(seam.attention).__name__
    return NotExpandable(f"{title}: its {name} does not compute {what}; modulate the block instead")


def _check_generic(site: Site, seam: GenericSeam, title: str) -> None:
    """What is put off must come out the same, gradients too: with every mask that it takes, and in training.

    In float64 where the attention can be copied.
    """
    assert site.arguments is not None
    attention, (args, kwargs) = seam.attention, site.arguments
    try:
        attention = copy.deepcopy(attention).double()
        args, kwargs = map_tensors(lambda x: x.double() if x.is_floating_point() else x, (args, kwargs))
        attention(*args, **kwargs)
    except Exception:
        attention, (args, kwargs) = seam.attention, site.arguments
    is_copy = attention is not seam.attention
    twin, known = GenericSeam(seam.block, attention), frozenset[str]()
    for options in ({}, *_masks(attention, args, kwargs)):
        inputs = {**kwargs, **options}
        try:
            want = list(tensors(attention(*args, **inputs)))
        except Exception:
            continue  # a mask of another shape or dtype than it takes
        try:
            output, readings = twin.tried(args, inputs)
        except NotExpandable:
            if options:
                continue  # which a forward will say, if it is given such a mask
            raise
        known |= readings
        if not _all_close(list(tensors(output)), want):
            raise _differs(title, seam, "the softmax of query and key times value" + (" under a mask" * bool(options)))
    seam.readings = known
    for training in (False, True) if is_copy else (False,):
        _check_gradients(twin, args, kwargs, title, training=training, is_copy=is_copy)
    _check_joined(site, seam, title)


def _check_gradients(seam: GenericSeam, args: Any, kwargs: Any, title: str, *, training: bool, is_copy: bool) -> None:
    """Outputs and gradients, which may be of the attention's own making, and other ones in training.

    Args:
        is_copy: whether the attention may be put in training, and its parameters be differentiated by.
    """
    attention = seam.attention
    if any(x.is_meta or x.dtype.itemsize < 4 for x in tensors((args, kwargs)) if x.is_floating_point()):
        return  # no numbers, or such whose rounding would hide what is looked for
    args, kwargs = map_tensors(lambda x: x.detach().clone(), (args, kwargs))
    parameters = [x for x in attention.parameters() if is_copy and x.requires_grad and not x.is_meta]
    if is_copy:
        attention.train(training)
    with torch.enable_grad():
        try:
            leaves = [x.requires_grad_() for x in tensors((args, kwargs)) if x.is_floating_point()] + parameters
            want = [_with_gradients(attention(*args, **kwargs), leaves) for _ in range(2)]
        except Exception:
            return  # it has no gradients, or does not run in training yet
        if not _all_close(*want):
            return  # dropout, say
        try:
            got = _with_gradients(seam.tried(args, kwargs)[0], leaves)
        except NotExpandable:
            raise
        except Exception as error:
            raise NotExpandable(f"{title}: its {type(attention).__name__} has no gradients: {error}") from error
    if not _all_close(got, want[0]):
        mode = " in training" * training
        raise _differs(title, seam, f"outputs and gradients as of the softmax of query and key times value{mode}")


def _with_gradients(output: Any, leaves: list[Tensor]) -> list[Tensor]:
    """What ``output`` holds, and the gradients of a random sum over that, flat, where they are finite."""
    outputs = list(tensors(output))
    reached = [x for x in outputs if x.requires_grad]
    found = torch.autograd.grad(reached, leaves, [random_like(x, *x.shape) for x in reached], allow_unused=True)
    grads = [
        (torch.zeros_like(x) if grad is None else grad).flatten().cpu() for x, grad in zip(leaves, found, strict=True)
    ]
    # together, as some are zero but for rounding: that of a bias of all keys, say
    return [*outputs, torch.cat(grads).nan_to_num(0.0, 0.0, 0.0)]


def _all_close(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(_close(a, b) for a, b in zip(got, want, strict=True))


def _check_joined(site: Site, seam: GenericSeam, title: str) -> None:
    """What runs in a forward, against concatenated keys and values."""
    assert site.arguments is not None
    args, kwargs = site.arguments
    tokens = find_tokens(args, kwargs, title)[1]
    task_kv = seam.keys_values(random_like(tokens, 1, 3, tokens.shape[-1]))
    try:
        streams, own = JoinedStreams(seam.block, 1, [0], task_kv), OwnTokens(seam.block, seam.is_square)
        got, want = (
            list(tensors(seam.run(way, *args, **kwargs)))
            for way in (
                partial(attend, streams, None, own),
                partial(attend_concatenated, None, task_kv, None, None),
            )
        )
    except NotExpandable:
        raise
    except Exception as error:  # whatever operations raise that keys and values are not made for
        raise NotExpandable(f"{title}: task tokens cannot join its {type(seam.attention).__name__}: {error}") from error
    if not _all_close(got, want):
        raise _differs(title, seam, "with task tokens what concatenated keys and values give")


def _masks(attention: nn.Module, args: Any, kwargs: Any) -> Iterator[dict[str, Tensor]]:
    """Masks that an attention might take by the name of one."""
    tokens = next(tensors((args, kwargs)))
    names = [name for name in inspect.signature(attention.forward).parameters if "mask" in name.lower()]
    if tokens.ndim != 3:
        return
    rows, n, _ = tokens.shape
    seen = random_like(tokens, rows, n, n) > -0.5
    seen |= torch.eye(n, dtype=torch.bool, device=seen.device)
    bias = torch.zeros_like(seen, dtype=tokens.dtype).masked_fill(~seen, -100.0)
    for name in names[:1]:
        for mask in (seen, seen[:, None], seen[0], seen[:, 0], bias, bias[:, None], bias[0], seen.to(tokens.dtype)):
            yield {name: mask}


def check_weights(site: Site, title: str, block: nn.Module, call: BlockCall) -> None:
    """torch's attention weights, which task keys would change, must not reach the block's output."""
    attention = site.seam.attention
    if not isinstance(attention, nn.MultiheadAttention):
        return

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = type(attention).forward(attention, *args, **kwargs)
        return out, None if weights is None else torch.full_like(weights, torch.nan)

    output = _run(block, call, site.seam, forward)
    if not call.tokens.is_meta and any(tensor.isnan().any() for tensor in tensors(output)):
        raise NotExpandable(
            f"{title} uses the weights that its nn.MultiheadAttention returns, which task tokens would change; "
            "modulate it instead"
        )


def check_block(site: Site, title: str, block: nn.Module, call: BlockCall) -> bool:
    """Task keys in the attention must give what concatenating the task tokens to the block's own gives.

    Returns:
        Whether the block runs on another number of tokens, and so could be asked.
    """
    tokens = call.tokens
    n, p = tokens.shape[1:]
    task = random_like(tokens, 1, 3, p)
    with _installed(site.seam, plain_attention):
        task_kv = site.seam.keys_values(task if site.norm is None else site.norm(task))
    attend = partial(attend_concatenated, None, task_kv, None, None)
    got = _first(_run(block, call, site.seam, partial(site.seam.run, attend)))
    beside = task.expand(len(tokens), -1, -1)
    # among the tokens of a causal attention, only those behind the task tokens see them
    for order, shared in (((tokens, beside), slice(0, n)), ((beside, tokens), slice(3, n + 3))):
        want = _first(_run(block, call.on(torch.cat(order, 1))))
        if not isinstance(want, Tensor) or want.shape != (len(tokens), n + 3, p):
            return False
        if got is not None and _close(got, want[:, shared], partial(_jump, block, call)):
            return True
    raise NotExpandable(
        f"{title}: with task tokens in its attention it would not compute what it does with them beside its own tokens "
        "(a bias, a mask or positions that they would get as well, keys from elsewhere, another use of its scores, or "
        "another layer that mixes tokens); modulate it instead, and leave it out of the plan's expansion"
    )


def check_keys(site: Site, title: str, block: nn.Module, call: BlockCall) -> None:
    """An attention of unknown make in a block that does not run on more tokens must be one beyond doubt.

    It makes keys and values of each token by itself, wherever and beside whatever it is, and nobody uses its scores for
    anything but the softmax and the values.
    """
    seam = site.seam
    if not isinstance(seam, GenericSeam) or call.tokens.is_meta:
        return
    assert site.arguments is not None
    name = type(seam.attention).__name__
    if seam.readings:
        raise NotExpandable(
            f"{title}: its {name} does {min(seam.readings)!r} to its scores or weights, which cannot be compared, as "
            "the block does not run on more tokens; modulate it instead, and leave it out of the plan's expansion"
        )

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        return seam.tried(args, kwargs, poisons=True)[0]

    output = _first(_run(block, call, seam, poisoned))
    if not isinstance(output, Tensor) or output.isnan().any():
        raise NotExpandable(f"{title} uses the scores or weights that its {name} returns; modulate it instead")
    read, *together = seam.projected(*site.arguments)
    if seam.reduction is None:  # one token in all places
        where, tokens = find_tokens(*site.arguments, name)
        everywhere = replace_argument(*site.arguments, where, tokens[:, :1].expand_as(tokens))
        if any(not _close(x, x[:, :, :1].expand_as(x)) for x in seam.projected(*everywhere)[1:]):
            raise _depends(title, name)
    for some in (slice(0, 2), slice(1, 3)):
        if read.shape[1] <= some.start:
            continue
        for alone, all_of_them in zip(seam.keys_values(read[:, some]), together, strict=True):
            if alone.shape[0] != all_of_them.shape[0] or not _close(alone, all_of_them[:, :, some]):
                raise _depends(title, name)
    for row in range(len(read)):  # heads and rows may lie the other way round
        for alone, all_of_them in zip(seam.keys_values(read[row : row + 1, :2]), together, strict=True):
            if not _close(alone, all_of_them[row : row + 1, :, :2]):
                raise _depends(title, name)


def _depends(title: str, name: str) -> NotExpandable:
    return NotExpandable(
        f"{title}: its {name} makes keys and values of a token that depend on where it is or on other tokens, which "
        "task tokens do not have; modulate the block instead"
    )


def check_copy(site: Site, title: str, block: nn.Module, call: BlockCall) -> None:
    """The same in float32, where low precision would hide a difference of a percent; in a copy, if there can be one."""
    if call.tokens.dtype.itemsize >= 4:
        return
    names = {module: name for name, module in block.named_modules()}
    try:
        twin = copy.deepcopy(block).float()
        seam = type(site.seam)(site.seam.block, twin.get_submodule(names[site.seam.attention]))
        norm = None if site.norm is None else twin.get_submodule(names[site.norm])
        twin_site = replace(site, seam=seam, norm=norm)
        tokens = call.tokens.float()
        with _installed(seam, plain_attention):
            seam.keys_values(tokens[:1, :3])
    except Exception:
        return  # weights that cannot be copied or widened, quantised ones say, or no memory for them
    check_block(twin_site, title, twin, call.on(tokens))


def learning_ones(site: Site, num_features: int, like: Tensor) -> tuple[nn.Module, ...]:
    """Norm and attention, if they compute something else after they have run in training."""
    attention, tokens = site.seam.attention, random_like(like, 2, site.seam.num_tokens(), num_features)
    args, kwargs = site.arguments or _arguments(site.seam, tokens)
    found = [attention] if learns(attention, *args, **kwargs) else []
    return (*found, site.norm) if site.norm is not None and learns(site.norm, tokens) else tuple(found)


def _arguments(seam: Seam, tokens: Tensor) -> Arguments:
    return (tokens,) * (3 if isinstance(seam.attention, nn.MultiheadAttention) else 1), {}


@contextmanager
def _installed(seam: Seam, attend: Attend) -> Iterator[None]:
    seam.install(partial(seam.run, attend))
    try:
        yield
    finally:
        seam.remove()


def _run(
    block: nn.Module, call: BlockCall, seam: Seam | None = None, forward: Callable[..., Any] | None = None
) -> Any | None:
    """The block on its own, with another forward of its attention; None where it does not run so."""
    handle = block.register_forward_hook(lambda *args: None)  # torch's fast path would not call the attention
    if seam is not None and forward is not None:
        seam.install(forward)
    try:
        return call.run(block)
    except Exception:
        return None
    finally:
        handle.remove()
        if seam is not None:
            seam.remove()


def _first(output: Any) -> Any:
    """The tokens among what a block or an attention returns."""
    return next(iter(tensors(output)), None)


def _jump(block: nn.Module, call: BlockCall) -> float:
    """How far the block's output moves, by root mean squares, when its tokens do by their rounding.

    Further than rounding where activations are quantised, of which some then fall on the other side of a step.
    """
    nudged = call.on(call.tokens * (1 + 8 * torch.finfo(call.tokens.dtype).eps))
    before, after = (_first(_run(block, one)) for one in (call, nudged))
    return float((after - before).double().square().mean().sqrt())


def _close(got: Tensor, want: Tensor, jump: Callable[[], float] | None = None) -> bool:
    """Equal but for rounding, by root mean squares; tensors without numbers tell nothing.

    Args:
        jump: how far apart they may be in any case, asked for where they differ.
    """
    if want.is_meta:
        return True
    # eager attention takes its softmax in float32 whatever its dtype is
    rounding = 1.5 * torch.finfo(want.dtype).eps if want.dtype.itemsize < 4 else 50 * torch.finfo(torch.float32).eps
    if want.dtype == torch.float32 and want.is_cuda and torch.get_float32_matmul_precision() != "highest":
        rounding = 1e-2
    error, size = ((x.double() if x.device.type != "mps" else x).square().mean().sqrt() for x in (got - want, want))
    return bool(error <= rounding * size) or (jump is not None and float(error) <= 3 * jump())
