"""One block's graph at a time: what is inside of a block is computed again in the backward pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Of each block, only the input is kept for the backward passes, each of which runs its forward once more."""
    before = {block: vars(block).get("forward") for block in blocks.values()}
    try:
        for block in before:
            block.forward = _checkpointed(block.forward)
        yield
    finally:
        for block, forward in before.items():
            if forward is not None:
                block.forward = forward
            elif "forward" in vars(block):
                del block.forward


def _checkpointed(forward: Any) -> Any:
    return partial(checkpoint, forward, use_reentrant=False)
