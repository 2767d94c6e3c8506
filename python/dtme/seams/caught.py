"""What is known of one run of an attention that is caught while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Attend, NotExpandable

if TYPE_CHECKING:
    from .deferred import Deferred


class Caught:
    """What is known of one run of an attention: an object of its own, as torch.compile sees nothing on a mode.

    Args:
        attend: as ``scaled_dot_product_attention``; with None for the value it returns the weights of the keys.
        rows: of the tokens that are attended to: where heads are folded into the batch, the rest is heads.
        block: its name, for messages.
        replaced: (weight, tokens) for linear layers that are to read other tokens than they are given.
        readings: what the attention may ask of its scores as tensors; None while it is tried.
    """

    def __init__(
        self,
        attend: Attend,
        rows: int,
        block: str,
        replaced: Sequence[tuple[Tensor, Tensor]] = (),
        readings: frozenset[str] | None = None,
    ) -> None:
        self.attend, self.rows, self.block, self.replaced, self.readings = attend, rows, block, replaced, readings
        self.has_gradient = torch.is_grad_enabled()
        self.num_calls = 0
        self.is_aside = False
        """Whether what was put off is being computed, whose products are not to be put off again."""
        self.read: list[str] = []
        """What was asked of scores or weights as tensors."""
        self.made: list[weakref.ref[Deferred]] = []

    def remember_reading(self, name: str) -> None:
        if self.readings is not None and name not in self.readings:
            raise self.refusal(f"does {name!r} to its scores or weights, as it did not when it was tried")
        self.read.append(name)

    def count(self) -> None:
        """It attends now."""
        self.num_calls += 1
        if torch.is_grad_enabled() != self.has_gradient:
            raise self.refusal("attends without gradients, or in a reentrant checkpoint of its own,")

    def kept(self) -> list[Deferred]:
        """What is still held by somebody."""
        return [some for reference in self.made if (some := reference()) is not None]

    def refusal(self, what: str) -> NotExpandable:
        return NotExpandable(f"block {self.block!r}: its attention {what}, which task tokens do not support")


class Aside:
    """While it is entered, products are computed as they come: those of what was put off, of which ``caught`` knows."""

    def __init__(self, caught: Caught) -> None:
        self.caught, self.before = caught, caught.is_aside

    def __enter__(self) -> None:
        self.caught.is_aside = True

    def __exit__(self, *error: object) -> None:
        self.caught.is_aside = self.before
