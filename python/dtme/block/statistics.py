"""Statistics of what passes through a norm or an attention in training, which task tokens must not enter.

Task tokens pass the norm and the projections of an attention once more than the block's own tokens do. Batch norm would
count them to the batch; spectral norm would take another step of its power iteration.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..seams import NotExpandable
from ..torch_private import iterates, takes_statistics
from ..trees import tensors


def learns(module: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether ``module`` computes something else after it has run in training; tried on a copy.

    False where that cannot be told: where there is no copy, or it does not run or not do the same twice.
    """

    def outputs(twin: nn.Module) -> list[Tensor]:
        return [x.clone() for x in tensors(twin.eval()(*args, **kwargs))]

    try:
        twin = copy.deepcopy(module)
        before, again = outputs(twin), outputs(twin)
        twin.train()(*args, **kwargs)
        after = outputs(twin)
        return _equal(before, again) and not _equal(before, after)
    except Exception:
        return False


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def check_statistics(block: str, passed: Iterable[nn.Module], learning: Sequence[nn.Module]) -> None:
    """Refuse, by the name of ``block``, to take statistics of task tokens.

    Args:
        passed: what task tokens pass, as it is now.
        learning: what of it ``learns`` found.
    """
    parts = [part for module in passed for part in module.modules()]
    keeping = [part for part in parts if takes_statistics(part) or iterates(part)]
    keeping += [module for module in learning if any(part.training for part in module.modules())]
    if keeping:
        raise NotExpandable(
            f"block {block!r}: the {type(keeping[0]).__name__} before or in its attention keeps statistics of what "
            "passes through it, and would take those of task tokens too: set it to evaluation mode after every "
            ".train(), or modulate the block instead"
        )
