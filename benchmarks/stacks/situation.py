"""One situation in which an expanded model is used, and how far its numbers are from those of plain code."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Situation(NamedTuple):
    """A row of the table of stacks."""

    stack: str
    """The library, or the part of this package, that the situation is about."""
    name: str
    """What is done there."""
    against: str
    """What the numbers are compared with."""
    limit: float
    """The largest difference, relative to the largest entry of the tensor it is in, that is rounding."""
    measure: Callable[[], float]
    """Runs the situation; the largest such difference. What must not happen is an exception."""
    needs: tuple[str, ...]
    """Libraries that have to be installed."""
    run: str
    """Situations that name the same run are measured by it together."""

    @property
    def title(self) -> str:
        return f"{self.stack}: {self.name}"

    def missing(self) -> list[str]:
        return [library for library in self.needs if importlib.util.find_spec(library) is None]


_known: dict[str, Situation] = {}


def situation(
    stack: str, name: str, *, against: str, limit: float, needs: tuple[str, ...] = (), run: str = ""
) -> Callable[[Callable[[], float]], Callable[[], float]]:
    """Make the decorated function, which measures it, a row of the table."""

    def register(measure: Callable[[], float]) -> Callable[[], float]:
        row = Situation(stack, name, against, limit, measure, needs, run or f"{stack}: {name}")
        if row.title in _known:
            raise ValueError(f"two situations are called {row.title!r}")
        _known[row.title] = row
        return measure

    return register


def situations() -> Iterator[Situation]:
    """All rows, in the order they were registered."""
    yield from _known.values()


def difference(found: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest entry of ``want``; infinite where shapes differ."""
    if found.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    found, want = found.detach().double(), want.detach().double()
    worst = ((found - want).abs().max() / want.abs().max().clamp(min=torch.finfo(torch.float64).tiny)).item()
    return worst if worst == worst else float("inf")


def largest(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest ``difference`` of tensors by name; infinite where names differ."""
    if found.keys() != want.keys():
        return float("inf")
    return max((difference(found[name], want[name]) for name in want), default=0.0)
