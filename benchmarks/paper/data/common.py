"""What data sets share: checks of their options, and the table's row of a task that sorts whole items into classes."""

from numbers import Integral

from .. import losses, metrics
from ..tasks import Task
from .dataset import Options


def classification(classes: tuple[str, ...]) -> Task:
    """One class for an image or a text: cross-entropy, and the share of items that are right."""
    return Task(
        len(classes),
        losses.cross_entropy,
        lambda: metrics.Accuracy(len(classes)),
        "accuracy",
        "%",
        lower_is_better=False,
        classes=classes,
        is_dense=False,
    )


def refuse(options: Options, data: str, *names: str) -> None:
    """Options that mean nothing to a data set.

    Raises:
        ValueError: one of them is given.
    """
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(
                f"{name} means nothing to the data set {data!r}: leave it out, got {getattr(options, name)}"
            )


def check_counts(options: Options) -> None:
    """Numbers of items, where they are given.

    Raises:
        ValueError: one of them is no whole number, or smaller than 1.
    """
    for split in ("train", "val"):
        count = getattr(options, split)
        if count is not None and not (isinstance(count, Integral) and count >= 1):
            raise ValueError(f"{split} must be at least 1, got {count}")


def check_size(options: Options, default: tuple[int, int], least: int) -> tuple[int, int]:
    """(height, width) of the images.

    Raises:
        ValueError: it is no pair of whole numbers that are at least ``least``.
    """
    size = default if options.size is None else options.size
    sides = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(side, Integral) and side >= least for side in sides):
        raise ValueError(f"size must be (height, width), each at least {least} pixels, got {options.size}")
    return int(sides[0]), int(sides[1])


def index_of(key: tuple[int, int | None], count: int) -> int:
    """The index of an item that is asked for, of ``count`` items.

    Raises:
        IndexError: there is no such item.
    """
    index = key[0]
    if not 0 <= index < count:
        raise IndexError(f"index must be in [0, {count}), got {index}")
    return index
