"""Which tokens of a batch count: not those that pad a sentence to the length of the longest."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

TokenMask = Callable[[Any], Tensor]
"""``token_mask(batch) -> (B, N)`` bool, True where a token counts; ``batch`` is what the loader yields."""


class Mask(NamedTuple):
    """What counts in one batch, (B, N) bool; None where all tokens do."""

    tokens: Tensor | None
    decoder: Tensor | None
    """For the decoder's blocks of an encoder-decoder model."""
    hides: bool
    """Whether there is any token that does not count."""


class TokenMasks:
    """The tokens that count, batch by batch.

    Args:
        given: None takes the 2-D ``attention_mask`` of an input that is a mapping, for the blocks that have a token for
            each of its columns; in the decoder of a model that has an encoder too, ``decoder_attention_mask``.
        blocks: their names.
    """

    def __init__(self, given: TokenMask | None, blocks: Iterable[str]) -> None:
        if given is not None and not callable(given):
            raise TypeError(f"token_mask must be None or a function of a batch, got {type(given).__name__}")
        self.given = given
        decoder = {name for name in blocks if _is_part_of(name, "dec")}
        self.decoder = decoder if any(_is_part_of(name, "enc") for name in blocks) else set()
        self.num_counted = 0
        """Tokens of all batches that count, where there was a mask."""
        self.num_masked = 0
        self._warned = False

    def of(self, batch: Any) -> Mask:
        """For one batch."""
        if self.given is None:
            inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
            return _mask(_mask_in(inputs, "attention_mask"), _mask_in(inputs, "decoder_attention_mask"))
        mask = self.given(batch)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
            got = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"token_mask must return a (B, N) bool tensor, True where a token counts, got {got}")
        return _mask(mask != 0, mask != 0)

    def at(self, mask: Mask, block: str, shape: torch.Size) -> Tensor | None:
        """The mask for tokens (B, N, p) of one block; None where all of them count.

        Raises:
            ValueError: the function that was given returned another number of rows or columns.
        """
        counts = mask.decoder if block in self.decoder else mask.tokens
        if counts is None or counts.shape == shape[:2]:
            return counts if mask.hides else None
        problem = (
            f"has {counts.shape[0]} rows and {counts.shape[1]} columns, but block {block!r} takes {shape[0]} rows of "
            f"{shape[1]} tokens"
        )
        if self.given is not None:
            raise ValueError(f"token_mask {problem}")
        if not self._warned:
            self._warned = True
            warnings.warn(f"the attention_mask {problem}: all of them count. Give token_mask=", stacklevel=2)
        return None

    def note(self, mask: Mask) -> None:
        """A batch was read."""
        for counts in [one for one in (mask.tokens, mask.decoder) if one is not None]:
            counted = int(counts.sum())
            self.num_counted += counted
            self.num_masked += counts.numel() - counted

    def check(self, num_counted: int, num_masked: int) -> None:
        """ValueError where no token of all batches counts."""
        if num_masked and not num_counted:
            name = "the attention_mask" if self.given is None else "token_mask"
            raise ValueError(f"{name} hides every token of every batch: True, or 1, is for tokens that count")


def _mask(tokens: Tensor | None, decoder: Tensor | None) -> Mask:
    return Mask(tokens, decoder, any(not bool(one.all()) for one in (tokens, decoder) if one is not None))


def _is_part_of(block: str, side: str) -> bool:
    return any(part.lower().startswith(side) for part in block.split("."))


def _mask_in(inputs: Any, name: str) -> Tensor | None:
    mask = inputs.get(name) if isinstance(inputs, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None
