"""The modules of a block that task tokens go through must stay those that it was expanded with."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn


class Watched(NamedTuple):
    """Where a module of a block is."""

    name: str
    parent: nn.Module
    child: str
    module: nn.Module


def watch(block: nn.Module, modules: Mapping[str, nn.Module | None]) -> list[Watched]:
    """Every place in ``block`` that one of ``modules`` (by a name for messages) has."""
    return [
        Watched(name, parent, child, module)
        for name, module in modules.items()
        for parent in block.modules()
        for child, one in parent.named_children()
        if module is not None and one is module
    ]


def check_whole(block: str, is_whole: bool, parameters: Iterable[nn.Module], watched: Iterable[Watched]) -> None:
    """RuntimeError, by the name of ``block``, where a library put copies in the place of modules.

    Copies (peft's ``modules_to_save``, DataParallel's replicas) would not be what runs.

    Args:
        is_whole: whether the block and what ``expand`` hung on it still belong together.
        parameters: the dictionaries of what was added.
        watched: the places that ``watch`` found.
    """
    if not is_whole or not all(type(x) is nn.ParameterDict for x in parameters):
        raise RuntimeError(
            f"the modules that dtme added to block {block!r} were replaced by copies or wrapped, which would "
            "be trained without ever running: leave them out (peft: modules_to_save) and let them train as they are"
        )
    for name, parent, child, module in watched:
        if parent._modules.get(child) is not module:
            raise RuntimeError(
                f"the {name} of block {block!r} was replaced after it was expanded, so that its task tokens "
                "would be lost: replace it first, then expand"
            )
