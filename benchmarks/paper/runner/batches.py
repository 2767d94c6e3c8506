"""Which items make the batch of a step: a function of the seed and the step alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import Data, Item, Items
from .config import Config

Key = tuple[int, int | None]


def seed_at(seed: int, number: int) -> int:
    """Of the random draws of a step or an epoch of a run."""
    return seed * 1_000_003 + number


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed_at(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def keys_of_step(seed: int, step: int, count: int, batch: int) -> list[Key]:
    """The items of a step, each with a ``draw`` of its own.

    Every epoch visits ``count`` items in an order of its own, without the last few that make no whole batch.
    """
    per_epoch = count // batch
    epoch, first = divmod(step, per_epoch)
    order = _order(seed, epoch, count)[first * batch : (first + 1) * batch]
    return [(index, seed_at(seed, step) * batch + i) for i, index in enumerate(order)]


class _Steps:
    """A batch sampler: the items of the steps from ``first`` on; of a process, its part of them."""

    def __init__(self, config: Config, count: int, first: int, last: int, rank: int, world: int) -> None:
        self.config, self.count, self.steps, self.rank, self.world = config, count, range(first, last), rank, world

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self.steps:
            keys = keys_of_step(self.config.seed, step, self.count, self.config.batch)
            yield keys[self.rank :: self.world]

    def __len__(self) -> int:
        return len(self.steps)


def training_batches(
    items: Items, config: Config, first: int, last: int, *, workers: int = 0, rank: int = 0, world: int = 1
) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """The batches of steps ``first`` to ``last``, on the device of the run."""
    sampler = _Steps(config, len(items), first, last, rank, world)
    loader = DataLoader(items, batch_sampler=sampler, num_workers=workers)  # type: ignore[arg-type]
    for batch in loader:
        yield moved(batch, config.device)


def splits(data: Data, config: Config) -> Data:
    """The splits that a run trains and validates on; where a share is held out, both are of the training items.

    Raises:
        ValueError: one is empty, or the training split has no whole batch.
    """
    for name, split in (("training", data.train), ("validation", data.val)):
        if not len(split):
            raise ValueError(f"the {name} split of {config.data} is empty")
    if config.held_out:
        count = len(data.train)
        kept = count - max(1, round(config.held_out * count))
        data = replace(data, train=Part(data.train, range(kept)), val=Part(data.train, range(kept, count)))
    if len(data.train) < config.batch:
        left = ", the held-out ones left out" if config.held_out else ""
        raise ValueError(f"--batch {config.batch} is more than the {len(data.train)} training items{left}")
    return data


class InOrder:
    """Batches of given items without random draws, the same at every iteration."""

    def __init__(self, items: Items, indices: Sequence[int], batch: int, device: str, workers: int = 0) -> None:
        keys: list[list[Key]] = [
            [(index, None) for index in indices[at : at + batch]] for at in range(0, len(indices), batch)
        ]
        self._device, self._length = device, len(keys)
        self._loader = DataLoader(items, batch_sampler=keys, num_workers=workers)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        for batch in self._loader:
            yield moved(batch, self._device)


class Part:
    """Some of the items of a split, as a split."""

    def __init__(self, items: Items, indices: Sequence[int]) -> None:
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, key: Key) -> Item:
        index, draw = key
        return self._items[self._indices[index], draw]


def moved(batch: Any, device: str) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: moved(value, device) for name, value in batch.items()}
    return tuple(moved(value, device) for value in batch)


def items_to_read(config: Config, count: int) -> list[int]:
    """Those that an analysis reads: drawn once per seed."""
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randperm(count, generator=generator)[: config.read].tolist()
