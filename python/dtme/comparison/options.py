"""What a comparison is asked for: checked before anything runs."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..plan import ExpansionPlan, check_tasks
from .arms import ARMS, JOINT, is_random
from .metrics import Metric

TUNING_SEED = 1_000_000
"""On which learning rates are chosen: none of the seeds that are compared."""
_NAME = re.compile(r"\w[\w+-]*")


@dataclass(frozen=True)
class Options:
    """The numbers of a comparison, as ``dtme.compare`` takes them; ValueError names the one that is wrong."""

    seeds: tuple[int, ...]
    budget: int
    share: float
    rates: tuple[float, ...]
    weight_decay: float
    num_tokens: int
    modulation: float
    expansion: float
    read: int | None
    margin: float

    @property
    def start(self) -> int:
        """Steps that are joint, after which the arms part."""
        return min(round(self.share * self.budget), self.budget - 1)

    def __post_init__(self) -> None:
        for name, least in (("budget", 2), ("num_tokens", 1)):
            _check_integer(name, getattr(self, name), least)
        if self.read is not None:
            _check_integer("read", self.read, 1, "None or ")
        for name in ("modulation", "expansion"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a share of the blocks in [0, 1], got {value!r}")
        if not _is_number(self.share) or not 0 <= self.share < 1:
            raise ValueError(f"share must be the share of the steps that are joint, in [0, 1), got {self.share!r}")
        if not self.modulation and not self.expansion:
            raise ValueError(
                "modulation and expansion are both 0: the plans would add nothing, and nothing is compared"
            )
        if not _is_number(self.weight_decay) or self.weight_decay < 0:
            raise ValueError(f"weight_decay must be a number of at least 0, got {self.weight_decay!r}")
        if not _is_number(self.margin) or self.margin <= 0:
            raise ValueError(f"margin must be a positive number of points, got {self.margin!r}")


def seeds_of(seeds: Any) -> tuple[int, ...]:
    """0 to n - 1 for a number n, or the seeds themselves."""
    if isinstance(seeds, str) or not isinstance(seeds, Sequence):
        _check_integer("seeds", seeds, 1, "a sequence of seeds, or ")
        return tuple(range(int(seeds)))
    for seed in seeds:
        _check_integer("seeds", seed, 0, "a number of seeds, or a sequence of ")
    if not seeds or len(set(seeds)) != len(seeds) or TUNING_SEED in seeds:
        raise ValueError(f"seeds must be one or more different integers other than {TUNING_SEED}, got {list(seeds)}")
    return tuple(seeds)


def rates_of(lr: Any) -> tuple[float, ...]:
    """One learning rate, or those that every arm tries, rising."""
    rates = tuple(lr) if isinstance(lr, Sequence) and not isinstance(lr, str) else (lr,)
    if not rates or not all(_is_number(rate) and rate > 0 for rate in rates) or len(set(rates)) != len(rates):
        raise ValueError(f"lr must be a positive number, or several different ones to choose from, got {lr!r}")
    return tuple(sorted(map(float, rates)))


def arms_of(arms: Any) -> dict[str, Any]:
    """``{name: None, or a plan or a function of the user's}``, in order.

    Raises:
        ValueError: a name is unknown, taken or given twice, or there is no joint training.
    """
    if isinstance(arms, (str, Mapping)) or not isinstance(arms, Sequence):
        raise ValueError(f"arms must be a sequence of names and of mappings {{name: arm of your own}}, got {arms!r}")
    found: list[tuple[str, Any]] = []
    for arm in arms:
        if isinstance(arm, Mapping):
            found += [_own_arm(name, value) for name, value in arm.items()]
        elif isinstance(arm, str) and (match := re.fullmatch(r"random\*([1-9]\d?)", arm)):
            found += [(f"random-{i + 1}", None) for i in range(int(match[1]))]
        elif isinstance(arm, str) and (arm in ARMS or is_random(arm)):
            found.append((arm, None))
        else:
            raise ValueError(
                f"arms names the unknown arm {arm!r}: known are {', '.join(ARMS)}, random-1, random-2, ... (random*4 "
                "for four of them), and mappings {name: plan or function} for arms of your own"
            )
    names = [name for name, _ in found]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"arms names {repeated[0]!r} twice")
    if "random" in names and "random-1" in names:
        raise ValueError("arms names both 'random' and 'random-1', which are the same plan")
    if JOINT not in names:
        raise ValueError(f"arms must hold {JOINT!r}, which the others are measured against, got {names}")
    return dict(found)


def _own_arm(name: Any, value: Any) -> tuple[str, Any]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"an arm's name must be of letters, digits, '_', '+' and '-', got {name!r}")
    if name in ARMS or is_random(name):
        raise ValueError(f"the arm {name!r} is known already: give your own another name")
    if not isinstance(value, ExpansionPlan) and not callable(value):
        raise ValueError(
            f"arms[{name!r}] must be an ExpansionPlan, or a function (model, report, seed) that returns one or a "
            f"model, got {type(value).__name__}"
        )
    return name, value


def check_loaders(loaders: Any, needs_tuning: bool) -> None:
    """ValueError, TypeError naming the loader that is missing, or that can be iterated once only."""
    known, needed = ("train", "val", "tune"), ("train", "val", *(("tune",) if needs_tuning else ()))
    if not isinstance(loaders, Mapping):
        raise TypeError(f"loaders must map 'train' and 'val' to loaders, got {type(loaders).__name__}")
    if unknown := [name for name in loaders if name not in known]:
        raise ValueError(f"loaders has the unknown key {unknown[0]!r}; known are {list(known)}")
    for name in needed:
        if name not in loaders:
            why = ", with held-out items that several learning rates are compared on" if name == "tune" else ""
            raise ValueError(f"loaders must have the key {name!r}{why}; it has {list(loaders)}")
        if isinstance(loaders[name], Iterator) or not isinstance(loaders[name], Iterable):
            raise TypeError(
                f"loaders[{name!r}] must be a DataLoader, a list or the like, which can be iterated again and again, "
                f"got {type(loaders[name]).__name__}"
            )


def check_losses_and_metrics(losses: Any, metrics: Any) -> dict[str, Metric]:
    """The metrics by task.

    Raises:
        TypeError, ValueError: they are of other tasks than the losses, or one is not what it has to be.
    """
    for name, given in (("losses", losses), ("metrics", metrics)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{name} must be a mapping by task, got {type(given).__name__}")
    tasks = check_tasks(list(losses))
    if len(tasks) < 2:
        raise ValueError(f"losses must name at least two tasks, got {list(tasks)}")
    if broken := [task for task in tasks if not callable(losses[task])]:
        raise TypeError(f"losses[{broken[0]!r}] must be a function, got {type(losses[broken[0]]).__name__}")
    if set(metrics) != set(tasks):
        raise ValueError(f"losses and metrics must be of the same tasks, got {list(tasks)} and {list(metrics)}")
    return {task: Metric(task, metrics[task]) for task in tasks}


def _check_integer(name: str, value: Any, least: int, before: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be {before}an integer of at least {least}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
