"""Tensors inside whatever a model takes or returns: tensors, sequences, mappings, model outputs."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply ``function`` to every tensor of ``tree`` and rebuild the structure around the results."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply ``function`` to everything in ``tree`` that is no sequence and no mapping."""
    if isinstance(tree, Mapping):
        mapped = {key: map_leaves(function, value) for key, value in tree.items()}
        # a model output is a dict whose fields are also attributes: only its own class can rebuild that
        return type(tree)(**mapped) if hasattr(tree, "to_tuple") else mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[map_leaves(function, value) for value in tree])
    if isinstance(tree, (list, tuple)):
        return type(tree)([map_leaves(function, value) for value in tree])
    return function(tree)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor of ``tree``, in the order ``map_tensors`` visits them."""
    yield from (leaf for leaf in leaves(tree) if isinstance(leaf, Tensor))


def leaves(tree: Any) -> Iterator[Any]:
    """Everything in ``tree`` that is no sequence and no mapping, in the order ``map_leaves`` visits it."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree


def opaque(tree: Any) -> Any:
    """The first thing in ``tree`` that may hold rows where nobody sees them, such as a key-value cache; else None."""
    plain = (Tensor, bool, int, float, str, bytes, torch.dtype, torch.device, type(None))
    return next((leaf for leaf in leaves(tree) if not isinstance(leaf, plain)), None)


def structure(tree: Any, *, single: bool = False) -> Any:
    """What trees of one kind have in common, hashable: containers, options, the dimensions of tensors; no sizes.

    Args:
        single: tell tensors of one row from those of several.
    """
    if isinstance(tree, Tensor):
        return "tensor", tree.ndim, tree.is_floating_point(), single and tree.ndim > 0 and tree.shape[0] == 1
    if isinstance(tree, Mapping):
        return type(tree).__name__, tuple([(key, structure(value, single=single)) for key, value in tree.items()])
    if isinstance(tree, (list, tuple)):
        if tree and all(isinstance(value, str) for value in tree):  # names of images, say
            return type(tree).__name__, "names"
        return type(tree).__name__, tuple([structure(value, single=single) for value in tree])
    return tree if tree is None or isinstance(tree, (bool, int, float, str)) else type(tree).__name__


def fresh(tree: Any) -> Any:
    """``tree`` in containers of its own, so that whoever fills or empties them does not reach the caller's."""
    if type(tree) is dict:
        return {key: fresh(value) for key, value in tree.items()}
    if isinstance(tree, (Mapping, set)):
        return copy.copy(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[fresh(value) for value in tree])
    if isinstance(tree, (list, tuple)):
        return type(tree)([fresh(value) for value in tree])
    return tree


def to_device(tree: Any, device: torch.device) -> Any:
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), tree)
