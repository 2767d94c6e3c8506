"""The batches of a run: those of a loader, again and again, from random numbers of their own."""

import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..analysis.folder import checksum
from ..analysis.loop import length_of
from ..randomness import State, random_state, wind_back
from ..trees import leaves

_END = object()


def seed_of(*parts: Any) -> int:
    """A seed of 32 bits for what ``parts`` name."""
    return zlib.crc32(repr(parts).encode())


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's global random numbers begin at ``seed``."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Repeated:
    """A loader that begins every iteration with the same random numbers."""

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        self.loader, self.seed = loader, seed

    def __iter__(self) -> Iterator[Any]:
        seed_everything(self.seed)
        return iter(self.loader)


class SizedRepeated(Repeated):
    """One that knows its length."""

    def __len__(self) -> int:
        length = length_of(self.loader)
        assert length is not None
        return length


def repeated(loader: Iterable[Any], seed: int) -> Repeated:
    return Repeated(loader, seed) if length_of(loader) is None else SizedRepeated(loader, seed)


class Summed:
    """Batches whose checksum is known once they were iterated."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.checksum = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.checksum = 0
        for batch in self.batches:
            self.checksum = checksum([self.checksum, *leaves(batch)])
            yield batch


class Batches:
    """The training batches of a seed, from one step on: a function of the loader, the seed and the step alone.

    The loader's random numbers are kept apart from those that the model draws, so that arms that draw more or fewer
    get the same batches. A checksum of all batches so far is noted after some steps, and compared.

    Args:
        loader: is iterated again when it is at its end.
        seed: of the loader's random numbers, together with the number of the iteration.
        epoch, index: the iteration and the batch in it that come next.
        checksum: of the batches before.
    """

    def __init__(self, loader: Iterable[Any], seed: int, epoch: int = 0, index: int = 0, checksum: int = 0) -> None:
        self.loader, self.seed, self.epoch, self.index, self.checksum = loader, seed, epoch, index, checksum
        self._iterator: Iterator[Any] = iter(())
        self._state: State | None = None  # of the loader's random numbers, once it has begun

    def next(self) -> Any:
        """The next batch. Random numbers are then where the loader left them.

        Raises:
            ValueError: the loader yields nothing.
        """
        if self._state is None:
            self._begin()
            for _ in range(self.index):
                next(self._iterator, _END)
        else:
            wind_back(self._state)
        batch = next(self._iterator, _END)
        if batch is _END:
            if self.index == 0:
                raise ValueError("loaders['train'] yields no batches")
            self.epoch, self.index = self.epoch + 1, 0
            self._begin()
            batch = next(self._iterator, _END)
            if batch is _END:
                raise ValueError("loaders['train'] can be iterated once only: give a DataLoader or a list")
        self.index += 1
        self._state = random_state()
        self.checksum = checksum([self.checksum, *leaves(batch)])
        return batch

    def _begin(self) -> None:
        seed_everything(seed_of(self.seed, "batches", self.epoch))
        self._iterator = iter(self.loader)


class Marks:
    """Checksums of all batches so far after some steps, by which two runs are found to differ within a few steps.

    Args:
        start: where the arms part: steps are noted at powers of two, and at these from there on.
        expected: those of the other runs of the seed, to which those are added that no other run had.
        known: of the joint part.
    """

    def __init__(self, start: int, budget: int, expected: dict[int, int], known: Mapping[int, int]) -> None:
        self.start, self.budget, self.expected, self.noted = start, budget, expected, dict(known)

    def note(self, step: int, value: int) -> bool:
        """Whether the batches up to ``step`` are those of the other runs, as far as that is known."""
        since = step - self.start
        if step in (self.start, self.budget) or step & (step - 1) == 0 or (since > 0 and since & (since - 1) == 0):
            self.noted[step] = value
            return self.expected.setdefault(step, value) == value
        return True


def check_repeats(loader: Iterable[Any], name: str, seed: int, count: int = 2) -> None:
    """Whether the loader's first batches are the same at two iterations that begin with the same random numbers.

    Raises:
        ValueError: they are not; the message names the loader.
    """
    first, second = ([checksum(leaves(batch)) for batch in _first(repeated(loader, seed), count)] for _ in range(2))
    if first != second:
        raise ValueError(not_repeating(loader, name))


def not_repeating(loader: Iterable[Any], name: str) -> str:
    return (
        f"loaders[{name!r}] ({type(loader).__name__}) does not repeat its batches, though torch's, NumPy's and "
        "Python's random numbers begin at the same seed each time, so that arms could not be compared in pairs: give a "
        "loader without a random generator of its own"
    )


def _first(batches: Iterable[Any], count: int) -> Iterator[Any]:
    for _, batch in zip(range(count), batches, strict=False):
        yield batch
