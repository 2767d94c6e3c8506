"""What a data set is to the evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..tasks import Tasks

Input = Tensor | dict[str, Tensor]
"""The input of one item: an image (3, H, W), normalised for the backbone; or the arguments of a text transformer."""
Item = tuple[Input, dict[str, Tensor]]
"""Input, and every task's label."""


class DataError(ValueError):
    """Files of a data set are missing or hold something else than they should: the message names them."""


class Items(Protocol):
    """A split. Items of a split have the same shapes, so that torch's default collation stacks them."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int | None]) -> Item:
        """The item ``(index, draw)``.

        ``draw`` seeds what is drawn for it, such as a crop; None draws nothing, as in an evaluation. Nothing but the
        two and the options decides what the item is: not the process that reads it, nor what it read before.
        """
        ...


@dataclass(frozen=True)
class Options:
    """How to open a data set. An option that means nothing to a data set is an error there if it is given."""

    root: Path | None = None
    """Where its files are; nothing is ever written there."""
    tasks: tuple[str, ...] | None = None
    """Names of some of its tasks; None for the default of the data set."""
    size: tuple[int, int] | None = None
    """(height, width) of an image in pixels; None for the default of the data set."""
    seed: int = 0
    """Seed of the data set itself where it is drawn: another seed gives other scenes or pairs. The order of training
    does not depend on it."""
    train: int | None = None
    """At most so many items of the split, the first ones; None for the default of the data set. ``val`` likewise."""
    val: int | None = None
    tokenizer: str | None = None
    """What cuts texts into tokens: a folder or name that transformers loads; None for a plain tokenizer of words."""
    cache: Path = Path("out/paper/cache")
    """For what is costly to make and can be made again."""


@dataclass(frozen=True)
class Data:
    """A data set that is open."""

    name: str
    tasks: Tasks
    train: Items
    val: Items
    size: tuple[int, int] | None
    """(height, width) of every image; None for texts."""
    vocabulary: int | None = None
    """Number of tokens that a text may hold; None for images."""

    @property
    def names(self) -> Sequence[str]:
        return list(self.tasks)
