"""What feeds a block's attention in a forward must be what fed it when the block was tried.

A block may do something else with other arguments than it was tried with, as to take another norm for some of its
tokens. Task tokens would then be normalised as no token of the block is.
"""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..seams import NotExpandable
from ..streams import Run
from ..torch_private import recomputing


def note(run: Run, tensor: Tensor, is_training: bool) -> None:
    """The attention is to be given ``tensor``: the block's tokens, or what its norm has just made of them."""
    if not torch.compiler.is_compiling():
        # in training dropout may lie on the way, behind which nobody else keeps the tensor
        run.feeds = partial(_itself, tensor) if is_training else weakref.ref(tensor)


def check(block: str, run: Run, arguments: Iterable[Any], is_training: bool) -> None:
    """Refuse, by the name of ``block``, an attention that is given something else."""
    if torch.compiler.is_compiling() or recomputing() or run.feeds is None:
        return
    fed, run.feeds = run.feeds(), None
    given = [value for value in arguments if isinstance(value, Tensor)]
    if not any(value is fed for value in given) and not (is_training and _may_be_dropped(fed, given)):
        raise NotExpandable(
            f"block {block!r}: its attention is not given what it was given when the block was tried, the block's "
            "tokens or what its norm makes of them: modulate it instead, and leave it out of the plan's expansion"
        )


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _may_be_dropped(fed: Tensor | None, given: list[Tensor]) -> bool:
    """Dropout leaves every entry 0, or as it is up to one scale."""
    if fed is None or not given or given[0].shape != fed.shape:
        return False
    ratio = (given[0] / fed)[(given[0] != 0) & (fed != 0)]
    return bool(torch.isclose(ratio, ratio[:1], rtol=1e-2).all())
