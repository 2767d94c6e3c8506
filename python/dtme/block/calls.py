"""Calls of a block by itself, on random tokens and unseen by anybody, to find out what it does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..seams import no_positions, required_parameters

MOST_TOKENS = 4096
"""On which a block is tried."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def unseen(block: nn.Module) -> Iterator[None]:
    """Run ``block`` without a hook of anybody's being called: what is tried here is nobody's forward.

    Torch's own of old weight norm, spectral norm and pruning stay: they make the weights.
    """
    hooks = [(module, name, getattr(module, name)) for module in block.modules() for name in _HOOKS]
    try:
        for module, name, known in hooks:
            made = [(key, hook) for key, hook in known.items() if type(hook).__module__.startswith("torch.nn.utils.")]
            setattr(module, name, type(known)(made))
        yield
    finally:
        for module, name, known in hooks:
            setattr(module, name, known)


class BlockCall(NamedTuple):
    """A call of a block by itself."""

    tokens: Tensor
    """(rows, N, p), random."""
    options: dict[str, Any]
    """What else it must be given; None for a mask and the like."""
    is_rotary: bool
    """Whether it takes cosines and sines, which are given so that they change nothing."""
    is_biased: bool = False
    """Whether it takes its scores' bias by distance, and is given zeros: of task tokens there is no distance."""

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def run(self, block: nn.Module) -> Any:
        positions: dict[str, Any] = {"position_embeddings": no_positions(self.tokens)} if self.is_rotary else {}
        if self.is_biased:
            positions["position_bias"] = self.tokens.new_zeros(1, 1, 1, 1)
        return block(self.tokens, **{**self.options, **positions})

    def on(self, tokens: Tensor) -> BlockCall:
        return self._replace(tokens=tokens)


def block_calls(block: nn.Module, num_features: int, like: Tensor) -> Iterator[BlockCall]:
    """Calls that a block may take: of any tokens, or of as many as it is made for, on a grid whose sides it wants."""
    parameters = inspect.signature(block.forward).parameters
    is_rotary = "position_embeddings" in parameters
    options: dict[str, Any] = dict.fromkeys(required_parameters(block.forward))
    unknown = [name for name in options if "mask" not in name.lower() and name != "position_embeddings"]
    plain = BlockCall(random_like(like, 2, 5, num_features), options, is_rotary)
    if "position_bias" in parameters and "position_bias" not in options:
        yield plain._replace(is_biased=True)
    yield plain
    for height, width in _grids(block, num_features):
        sizes: Any = [height, width] if len(unknown) == 2 else [(height, width)] * len(unknown)
        on_grid = {**options, **dict(zip(unknown, sizes, strict=True))}
        yield BlockCall(random_like(like, 2, height * width, num_features), on_grid, is_rotary)


def _grids(block: nn.Module, num_features: int) -> list[tuple[int, int]]:
    """Heights and widths: by what the block says that it is made for, by its tables of pairs of tokens, and others."""
    said: list[tuple[int, int]] = []
    for module in block.modules():
        for name in ("input_resolution", "window_size", "feat_size"):
            size = getattr(module, name, None)
            height, width = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
            said += [(height, width)] if isinstance(height, int) and isinstance(width, int) else []
        for table in (*module.parameters(False), *module.buffers(False), *vars(module).values()):
            if isinstance(table, Tensor) and table.ndim >= 2 and table.shape[-1] == table.shape[-2] != num_features:
                said.append((1, table.shape[-1]))
    said = sorted({grid for grid in said if 1 < grid[0] * grid[1] <= MOST_TOKENS}, reverse=True)
    return list(dict.fromkeys([*said, (8, 8), (4, 4), (7, 7), (14, 14), (16, 16)]))


def random_like(like: Tensor, *shape: int) -> Tensor:
    """The same numbers at every call with this shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(like)
