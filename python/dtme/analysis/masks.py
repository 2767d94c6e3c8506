"""Which tokens of a batch count: not those that pad a sentence to the length of the longest."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TokenMask = Callable[[Any], Tensor]
"""``token_mask(batch) -> (B, N)`` bool, True where a token counts; ``batch`` is what the loader yields."""


class TokenMasks:
    """The tokens that count, batch by batch.

    Args:
        given: None takes the 2-D ``attention_mask`` of an input that is a mapping, for the blocks that have a token for
            each of its columns.
    """

    def __init__(self, given: TokenMask | None) -> None:
        if given is not None and not callable(given):
            raise TypeError(f"token_mask must be None or a function of a batch, got {type(given).__name__}")
        self.given = given
        self.num_counted = 0
        """Tokens of all batches that count, where there was a mask."""
        self.num_masked = 0
        self._warned = False

    def of(self, batch: Any) -> Tensor | None:
        """(B, N) bool for one batch; None where all tokens count."""
        if self.given is None:
            return self._attention_mask(batch)
        mask = self.given(batch)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
            got = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"token_mask must return a (B, N) bool tensor, True where a token counts, got {got}")
        return mask != 0

    def _attention_mask(self, batch: Any) -> Tensor | None:
        inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def at(self, mask: Tensor | None, block: str, shape: torch.Size) -> Tensor | None:
        """The mask for tokens (B, N, p) of one block.

        Raises:
            ValueError: the function that was given returned another number of rows or columns.
        """
        if mask is None or mask.shape == shape[:2]:
            return mask
        problem = (
            f"has {mask.shape[0]} rows and {mask.shape[1]} columns, but block {block!r} takes {shape[0]} rows of "
            f"{shape[1]} tokens"
        )
        if self.given is not None:
            raise ValueError(f"token_mask {problem}")
        if not self._warned:
            self._warned = True
            warnings.warn(f"the attention_mask {problem}: all of them count. Give token_mask=", stacklevel=2)
        return None

    def note(self, mask: Tensor | None) -> None:
        """A batch was read."""
        if mask is not None:
            counted = int(mask.sum())
            self.num_counted += counted
            self.num_masked += mask.numel() - counted

    def check(self) -> None:
        """ValueError where no token of all batches counts."""
        if self.num_masked and not self.num_counted:
            name = "the attention_mask" if self.given is None else "token_mask"
            raise ValueError(f"{name} hides every token of every batch: True, or 1, is for tokens that count")
