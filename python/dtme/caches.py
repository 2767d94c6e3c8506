"""Key-value caches of transformers: whose tokens one holds, and how many keys an attention has beside it.

Keys and values of task tokens never enter a cache: they join the attention anew at every step. But what a cache holds
was computed in the stream of one task, and only that may go on with it. So a cache remembers, as an attribute that
copies of it take along, for which stream it was filled.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .expanded import Expansion, alike
from .trees import leaves, tensors

_MARK, _TASK_KEYS = "_dtme_filled_for", "_dtme_task_keys"
_PLAIN = (Tensor, bool, int, float, str, bytes, torch.dtype, torch.device, torch.SymInt, torch.SymFloat, torch.SymBool)


def is_cache(leaf: Any) -> bool:
    """transformers' base class of every key-value cache, told by name."""
    if leaf is None or isinstance(leaf, _PLAIN):  # torch.compile knows no bases of numbers
        return False
    return any(base.__name__ == "Cache" for base in type(leaf).__mro__)


def caches_in(tree: Any) -> Iterator[Any]:
    """Every cache in ``tree``; the two of an encoder-decoder one by one, as each may be put into another pair."""
    for leaf in leaves(tree):
        if is_cache(leaf):
            parts = (getattr(leaf, name, None) for name in ("self_attention_cache", "cross_attention_cache"))
            yield from [part for part in parts if part is not None] or [leaf]


# --- whose tokens -----------------------------------------------------------------------------------------------------


class Filled(NamedTuple):
    """The stream that the tokens of a cache ran in."""

    stream: tuple[tuple[str, ...], ...]
    """What ``alike`` tells its tasks by, and the plans that the backbone was expanded by."""
    tasks: tuple[str, ...]
    """As they were asked for, for messages."""


def filled_for(tasks: Sequence[str], expansions: Sequence[Expansion]) -> Filled | None:
    """The mark of a cache that ``tasks`` fill together; None if they have several streams, and no cache in common."""
    return (
        filled_by_row(tasks[:1], expansions)._replace(tasks=tuple(tasks))
        if len(alike(tasks, expansions)) == 1
        else None
    )


def filled_by_row(task_of_row: Sequence[str], expansions: Sequence[Expansion]) -> Filled:
    """The mark of a cache whose rows are of these tasks; of one alone, all are."""
    plans = tuple([expansion.fingerprint for expansion in expansions])
    streams = [stream for task in task_of_row for stream in alike([task], expansions)]
    return Filled((*streams, plans), tuple(task_of_row))


def claim(tree: Any, mark: Filled) -> None:
    """Every cache in ``tree`` is about to be read and filled in a forward of ``mark``'s stream.

    Raises:
        RuntimeError: it holds tokens of another stream, or nobody knows of which: from before the backbone was
            expanded, or out of keys and values that somebody put together.
    """
    for cache in caches_in(tree):
        known = getattr(cache, _MARK, None)
        if known is not None and known.stream == mark.stream:
            continue
        if _is_filled(cache):
            held = "that did not run in this expanded backbone" if known is None else f"of {list(known.tasks)}"
            held += ", run by another plan" if known is not None and known.tasks == mark.tasks else ""
            raise RuntimeError(
                f"a key-value cache ({type(cache).__name__}) holds tokens {held}, and {list(mark.tasks)} cannot go on "
                "with their keys and values: give every task a cache of its own, filled inside of its "
                "`with dtme.tasks(backbone, task)` from the first token on"
            )
        setattr(cache, _MARK, mark)


def mark_new(tree: Any, mark: Filled | None) -> None:
    """Caches in ``tree``, which a forward of ``mark``'s stream returned, are that stream's, unless they are claimed."""
    for cache in caches_in(tree) if mark is not None else ():
        if getattr(cache, _MARK, None) is None:
            setattr(cache, _MARK, mark)


def _is_filled(cache: Any) -> bool:
    """Whether it holds anything. One into which nobody sees counts as empty until it was marked."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return getattr(cache, _MARK, None) is not None
    return any(_holds_tokens(layer) or _holds_state(layer) for layer in layers)


def _holds_tokens(layer: Any) -> bool:
    length = getattr(layer, "get_seq_length", None)
    return length is not None and bool(length() > 0)


def _holds_state(layer: Any) -> bool:
    """Of a recurrence or a convolution."""
    states = getattr(layer, "has_previous_state", False)
    return any(states.values()) if isinstance(states, dict) else bool(states)


def copy_of(cache: Any) -> Any:
    """A cache of the same contents, without their graph, that may be filled without reaching ``cache``."""
    layers = [layer for part in caches_in(cache) for layer in getattr(part, "layers", ())]
    held = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return copy.deepcopy(cache, {id(tensor): tensor.detach().clone() for tensor in held})


# --- how many keys ----------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What an attention over its own tokens, and those that its cache holds of them, must come to."""

    num_queries: int
    num_keys: int
    """Places for keys, of which a mask may hide some: a static cache has all of its places from the start."""
    cache: Any = None


_OTHER_TOKENS = ("key_value_states", "encoder_hidden_states", "encoder_hidden_state", "kv_states")
"""Arguments of attentions over tokens that are not their own, and whose cache holds those."""


def cached_sizes(layer: int | None, names: Sequence[str], args: Any, kwargs: Any) -> Sizes | str | None:
    """By transformers' contract: for N more tokens the keys will be as many as ``cache.get_mask_sizes(N, layer)`` says.

    To be asked before the attention runs, which fills the cache.

    Args:
        layer: of the cache, which the attention fills; None where it does not say.
        names: of the attention's parameters, for ``args``.

    Returns:
        None where the attention is given no cache; a string, why the keys are not known to be those of its own tokens.
    """
    cache = next((leaf for leaf in leaves((args, kwargs)) if is_cache(leaf)), None)
    if cache is None:
        return None
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if name in _OTHER_TOKENS and isinstance(value, Tensor):
            return f"it is given {name!r} beside a key-value cache"
    if layer is None:
        return f"it does not say by layer_idx which layer of its key-value cache ({type(cache).__name__}) it fills"
    try:
        num_queries = next(tensors((args, kwargs))).shape[1]  # the first are its tokens, (B, N, p)
        num_keys, _ = cache.get_mask_sizes(num_queries, layer)
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        return f"its key-value cache ({type(cache).__name__}) does not say how many keys layer {layer} has: {error}"
    return Sizes(num_queries, num_keys, cache)


# --- keys of task tokens ----------------------------------------------------------------------------------------------


def with_cache(
    sizes: Sizes | str | None, name: Any, make: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Keys and values of a block's task tokens, which a cache remembers for as long as it holds earlier tokens.

    They are then what those of the earlier tokens are: computed once, when the first of them ran. Whoever changes the
    weights in the middle of a text finds the keys of all its tokens, and of the task's, as they were; a cache that was
    emptied or is new has them computed anew. A static cache, whose length nobody knows without reading it, remembers
    nothing, nor does one whose keys are to be differentiated.

    Args:
        name: of the block and of who owns the tokens of its streams.
    """
    cache = getattr(sizes, "cache", None)
    if cache is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or cache.is_compileable:
        return make()
    known = vars(cache).setdefault(_TASK_KEYS, {})
    if sizes.num_keys == sizes.num_queries or name not in known:  # type: ignore[union-attr]
        known[name] = make()
    return known[name]
