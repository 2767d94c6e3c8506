"""What goes where: the expansion plan."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .files import load_json, save_json

KIND = "dtme.ExpansionPlan"
NUM_TOKENS = {"text": 6, "params": 1}
"""Task tokens per block: six in the paper's text, one in its parameter counts (method.md, section 4)."""


@dataclass(frozen=True)
class ExpansionPlan:
    """Which tasks get a modulation and which get task tokens, block by block (Algorithm 1).

    Args:
        tasks: all tasks of the model, at least one; non-empty, unique, without dots.
        num_tokens: task tokens per task and expanded block, at least 1.
        modulation: ``{block name: tasks}`` that get a per-channel affine map.
        expansion: ``{block name: tasks}`` that get task tokens.
        num_features: ``{block name: p}`` of every analysed block that two or more tasks reach, in forward order.
            ``expand`` changes no other block, and uses the widths to refuse another model; a plan built by hand may
            leave it empty.

    Raises:
        ValueError: naming the field, the block and the value that is wrong.
    """

    tasks: tuple[str, ...]
    num_tokens: int = 6
    modulation: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expansion: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    num_features: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", check_tasks(self.tasks))
        if not isinstance(self.num_tokens, int) or isinstance(self.num_tokens, bool) or self.num_tokens < 1:
            raise ValueError(f"num_tokens must be an integer of at least 1, got {self.num_tokens!r}")
        for name in ("modulation", "expansion"):
            object.__setattr__(self, name, self._checked(name))
        if not isinstance(self.num_features, Mapping):
            raise ValueError(f"num_features must map block names to widths, got {self.num_features!r}")
        _check_widths(self.num_features)

    def _checked(self, name: str) -> dict[str, tuple[str, ...]]:
        blocks = getattr(self, name)
        if not isinstance(blocks, Mapping):
            raise ValueError(f"{name} must map block names to tasks, got {blocks!r}")
        for block, tasks in blocks.items():
            if not isinstance(block, str) or isinstance(tasks, str) or not isinstance(tasks, Sequence):
                raise ValueError(f"{name}[{block!r}] must be a sequence of task names, got {tasks!r}")
            if unknown := [task for task in tasks if task not in self.tasks]:
                raise ValueError(
                    f"{name}[{block!r}] names the unknown task {unknown[0]!r}; tasks are {list(self.tasks)}"
                )
            if len(set(tasks)) != len(tasks):
                raise ValueError(f"{name}[{block!r}] names a task twice: {list(tasks)}")
        return {block: tuple(tasks) for block, tasks in blocks.items() if tasks}

    @property
    def blocks(self) -> tuple[str, ...]:
        """Every block the plan changes, in forward order as far as it is known."""
        chosen = dict.fromkeys([*self.modulation, *self.expansion])
        known = [block for block in self.num_features if block in chosen]
        return tuple(dict.fromkeys([*known, *chosen]))

    def added_parameters(self, num_features: int | Mapping[str, int] | Sequence[int] | None = None) -> int:
        """Parameters the plan adds: 2p per task and modulated block, t * p per task and expanded block.

        Args:
            num_features: p, one width for all blocks, ``{block name: width}``, or one width per block of the plan's own
                ``num_features`` in their order; None takes those.
        """
        widths = self._widths(num_features)
        _check_widths(widths)
        total = 0
        for name, per_channel in (("modulation", 2), ("expansion", self.num_tokens)):
            for block, tasks in getattr(self, name).items():
                if block not in widths:
                    raise ValueError(f"num_features has no width for block {block!r}")
                total += per_channel * widths[block] * len(tasks)
        return total

    def _widths(self, num_features: int | Mapping[str, int] | Sequence[int] | None) -> Mapping[str, int]:
        if num_features is None:
            return self.num_features
        if isinstance(num_features, int):
            return dict.fromkeys(self.blocks, num_features)
        if isinstance(num_features, Mapping):
            return num_features
        if isinstance(num_features, str) or not isinstance(num_features, Sequence):
            raise TypeError(f"num_features must be a width, a mapping or a sequence of widths, got {num_features!r}")
        blocks = tuple(self.num_features) or self.blocks
        if len(num_features) != len(blocks):
            raise ValueError(
                f"num_features must hold one width for each of {len(blocks)} blocks, got {len(num_features)}"
            )
        return dict(zip(blocks, num_features, strict=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write readable JSON, editable by hand."""
        save_json(path, KIND, self.as_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExpansionPlan":
        """Read and validate what ``save`` wrote or a hand edited; ValueError names the file and the field."""
        content = load_json(path, KIND, {"tasks", "num_tokens", "modulation", "expansion"}, {"num_features"})
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        return {
            "tasks": list(self.tasks),
            "num_tokens": self.num_tokens,
            "modulation": {block: list(tasks) for block, tasks in self.modulation.items()},
            "expansion": {block: list(tasks) for block, tasks in self.expansion.items()},
            "num_features": dict(self.num_features),
        }


def _check_widths(num_features: Mapping[str, int]) -> None:
    for block, width in num_features.items():
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ValueError(f"num_features[{block!r}] must be a positive integer, got {width!r}")


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """``tasks`` as a tuple, if each can name a parameter: non-empty, unique, no dots."""
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not tasks:
        raise ValueError(f"tasks must be a non-empty sequence of names, got {tasks!r}")
    for task in tasks:
        if not isinstance(task, str) or not task or "." in task:
            raise ValueError(f"a task name must be a non-empty string without dots, got {task!r}")
        if task == "training" or hasattr(nn.ModuleDict, task) or hasattr(nn.ParameterDict, task):
            raise ValueError(
                f"the task name {task!r} is taken by torch.nn.Module: choose another, such as {task + '_task'!r}"
            )
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"task names must be unique, got {list(tasks)}")
    return tuple(tasks)
