"""Modules that keep statistics of what passes through them in training, which task tokens must not enter.

Task tokens pass the norm and the projections of an attention once more than the block's own tokens do. Batch norm would
count them to the batch; spectral norm would take another step of its power iteration.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..randomness import Saved
from ..seams import NotExpandable


def find_statistics(modules: Sequence[nn.Module], run: Callable[[], Any]) -> tuple[nn.Module, ...]:
    """Those of ``modules`` whose buffers ``run()`` changes in training and leaves alone in evaluation mode."""
    changed: list[set[nn.Module]] = []
    saved = [(module, Saved(module)) for module in modules]
    try:
        for training in (False, True):
            for module in modules:
                module.training = training
            before = [(module, Saved(module)) for module in modules]
            try:
                run()
            except Exception:
                if not training:
                    raise
                return ()  # a forward in training will raise it as well
            changed.append({module for module, was in before if was.is_changed(module)})
    finally:
        for module, was in saved:
            was.put_back(module)
    return tuple(module for module in modules if module in changed[1] - changed[0])


def check_statistics(block: str, modules: Sequence[nn.Module]) -> None:
    """Refuse, by the name of ``block``, to take statistics of task tokens.

    Args:
        modules: what ``find_statistics`` found.
    """
    for module in modules:
        if module.training:
            raise NotExpandable(
                f"block {block!r}: the {type(module).__name__} before its attention keeps statistics of what passes "
                "through it in training, and would take those of task tokens too: set it to evaluation mode, or "
                "modulate the block instead"
            )
