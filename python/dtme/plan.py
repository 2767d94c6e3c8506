"""What goes where: the expansion plan."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .checks import Record, anything
from .formats import Format, is_whole
from .pickles import Stamped

# a plan checks its fields itself: people build it by hand too
FIELDS = Record(
    dict.fromkeys(("tasks", "num_tokens", "modulation", "expansion"), anything),
    dict.fromkeys(("num_features", "groups"), anything),
)
FORMAT = Format("dtme.ExpansionPlan", FIELDS, by_hand=True)
NUM_TOKENS = {"text": 6, "params": 1}
"""Task tokens per block: six in the paper's text, one in its parameter counts."""


@dataclass(frozen=True)
class ExpansionPlan(Stamped):
    """Which tasks get a modulation and which get task tokens, block by block (Algorithm 1).

    Args:
        tasks: all tasks of the model, at least one; non-empty, unique, without dots.
        num_tokens: task tokens per task and expanded block, at least 1.
        modulation: ``{block name: tasks}`` that get a per-channel affine map.
        expansion: ``{block name: tasks}`` that get task tokens.
        num_features: ``{block name: p}`` of every analysed block that two or more tasks reach, in forward order.
            ``expand`` changes no other block, and uses the widths to refuse another model; a plan built by hand may
            leave it empty.
        groups: ``{group name: tasks}``; a task is in one group at most. The tasks of a group share one stream and one
            set of modules, whose parameters are named by the group. A group's name may be that of one of its own tasks,
            but not of another. In ``modulation`` and ``expansion`` it stands for all its tasks, which are there
            together or not at all; as attributes these two hold tasks, in the order of ``tasks``.

    Raises:
        ValueError: naming the field, the block or group and the value that is wrong.
    """

    tasks: tuple[str, ...]
    num_tokens: int = 6
    modulation: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expansion: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    num_features: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", check_tasks(self.tasks))
        if not isinstance(self.num_tokens, int) or isinstance(self.num_tokens, bool) or self.num_tokens < 1:
            raise ValueError(f"num_tokens must be an integer of at least 1, got {self.num_tokens!r}")
        object.__setattr__(self, "groups", _check_groups(self.groups, self.tasks))
        for name in ("modulation", "expansion"):
            object.__setattr__(self, name, self._checked(name))
        if not isinstance(self.num_features, Mapping):
            raise ValueError(f"num_features must map block names to widths, got {self.num_features!r}")
        _check_widths(self.num_features)

    def _checked(self, name: str) -> dict[str, tuple[str, ...]]:
        blocks = getattr(self, name)
        if not isinstance(blocks, Mapping):
            raise ValueError(f"{name} must map block names to tasks, got {blocks!r}")
        return {block: found for block, names in blocks.items() if (found := self._tasks_of(name, block, names))}

    def _tasks_of(self, where: str, block: str, names: Sequence[str]) -> tuple[str, ...]:
        """The tasks that ``names``, of tasks and groups, stand for."""
        if not isinstance(block, str) or isinstance(names, str) or not isinstance(names, Sequence):
            raise ValueError(f"{where}[{block!r}] must be a sequence of task names, got {names!r}")
        if unknown := [name for name in names if name not in (*self.tasks, *self.groups)]:
            groups = f", groups are {list(self.groups)}" if self.groups else ""
            raise ValueError(
                f"{where}[{block!r}] names the unknown task {unknown[0]!r}; tasks are {list(self.tasks)}{groups}"
            )
        listed = [task for name in names for task in ((name,) if name in self.tasks else self.groups[name])]
        if len(set(listed)) != len(listed):
            raise ValueError(f"{where}[{block!r}] names a task twice: {list(names)}")
        # a name that a group shares with one of its tasks stands for the group
        chosen = {*listed, *(task for name in names for task in self.groups.get(name, ()))}
        for group, tasks in self.groups.items():
            missing = [task for task in tasks if task not in chosen]
            if missing and len(missing) < len(tasks):
                raise ValueError(
                    f"{where}[{block!r}] names tasks of the group {group!r}, which share their modules, but leaves out "
                    f"{missing[0]!r}: name {group!r}, all its tasks or none"
                )
        return tuple(task for task in self.tasks if task in chosen)

    def owner(self, task: str) -> str:
        """Whose modules and stream ``task`` has: those of its group, else its own."""
        return next((group for group, tasks in self.groups.items() if task in tasks), task)

    def owners(self, tasks: Iterable[str]) -> tuple[str, ...]:
        """The owner of each of ``tasks``, each owner once."""
        return tuple(dict.fromkeys(self.owner(task) for task in tasks))

    @property
    def blocks(self) -> tuple[str, ...]:
        """Every block the plan changes, in forward order as far as it is known."""
        chosen = dict.fromkeys([*self.modulation, *self.expansion])
        known = [block for block in self.num_features if block in chosen]
        return tuple(dict.fromkeys([*known, *chosen]))

    def added_parameters(self, num_features: int | Mapping[str, int] | Sequence[int] | None = None) -> int:
        """Parameters the plan adds: 2p per modulated block, t * p per expanded block, for each of its groups and tasks.

        A group has them once, whatever the number of its tasks.

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
                total += per_channel * widths[block] * len(self.owners(tasks))
        return total

    def compute(self, tasks: str | Sequence[str] | None = None) -> float:
        """Blocks run in all streams of the expanded model, over the blocks of the plain one; 1.0 for one task.

        A plan that changes nothing takes 1.0 too, whether it knows the model's blocks or not.

        Tasks share one stream until a block has modules of some of them. From there on these run in streams of their
        own, one for every group and for every task that is in none.

        Args:
            tasks: those that run, a name or several; None for all.

        Raises:
            ValueError: a name is unknown or given twice; the plan does not know the model's blocks, or not all of its
                own, because its ``num_features`` leave them out.
        """
        shared = set(self.owners(choose(tasks, self.tasks)))
        if not self.blocks:
            return 1.0
        if not self.num_features:
            raise ValueError(
                "the compute of this plan is not known, because its num_features are empty: give the width of every "
                "block of the model, in forward order"
            )
        if unknown := [block for block in self.blocks if block not in self.num_features]:
            raise ValueError(f"the plan changes block {unknown[0]!r}, which its num_features leave out")
        num_runs = num_apart = 0
        for block in self.num_features:
            leaving = {*self.owners(self.modulation.get(block, ())), *self.owners(self.expansion.get(block, ()))}
            num_apart += len(shared & leaving)
            shared -= leaving
            num_runs += num_apart + bool(shared)
        return num_runs / len(self.num_features)

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
        FORMAT.save(path, self.as_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExpansionPlan":
        """Read and validate what ``save`` wrote or a hand edited; ValueError names the file and the field."""
        content = FORMAT.load(path).content
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """What ``save`` writes; a group's name stands for its tasks."""
        content: dict[str, Any] = {
            "tasks": list(self.tasks),
            "num_tokens": self.num_tokens,
            "modulation": {block: list(self.owners(tasks)) for block, tasks in self.modulation.items()},
            "expansion": {block: list(self.owners(tasks)) for block, tasks in self.expansion.items()},
            "num_features": dict(self.num_features),
        }
        # a plan without groups stays one that earlier releases read
        return content | (
            {"groups": {group: list(tasks) for group, tasks in self.groups.items()}} if self.groups else {}
        )


def check_plan(value: Any, where: str) -> ExpansionPlan:
    """The plan whose ``as_dict`` a file holds at ``where``."""
    fields = FIELDS(value, where)
    try:
        return ExpansionPlan(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_widths(num_features: Mapping[str, int]) -> None:
    for block, width in num_features.items():
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ValueError(f"num_features[{block!r}] must be a positive integer, got {width!r}")


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """``tasks`` as a tuple, if each can name a parameter: non-empty, unique, no dots."""
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not tasks:
        raise ValueError(f"tasks must be a non-empty sequence of names, got {tasks!r}")
    for task in tasks:
        _check_name(task, "task")
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"task names must be unique, got {list(tasks)}")
    return tuple(tasks)


def _check_name(name: Any, kind: str) -> None:
    """Whether ``name`` can be that of a parameter in a module's dictionary of them."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"a {kind} name must be a non-empty string without dots, got {name!r}")
    if not is_whole(name):
        raise ValueError(f"a {kind} name must be text that a file can hold, got {name!r} with half of a character")
    if name == "training" or hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name):
        raise ValueError(
            f"the {kind} name {name!r} is taken by torch.nn.Module: choose another, such as {f'{name}_{kind}'!r}"
        )


def _check_groups(groups: Any, tasks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    if not isinstance(groups, Mapping):
        raise ValueError(f"groups must map group names to tasks, got {groups!r}")
    group_of: dict[str, str] = {}
    for group, members in groups.items():
        _check_name(group, "group")
        if isinstance(members, str) or not isinstance(members, Sequence) or not members:
            raise ValueError(f"groups[{group!r}] must be a non-empty sequence of task names, got {members!r}")
        if group in tasks and group not in members:
            raise ValueError(f"groups[{group!r}] has the name of a task that is not in it: choose another")
        for task in members:
            if task not in tasks:
                raise ValueError(f"groups[{group!r}] names the unknown task {task!r}; tasks are {list(tasks)}")
            if (other := group_of.setdefault(task, group)) != group:
                raise ValueError(f"groups overlap: task {task!r} is in both {other!r} and {group!r}")
        if len(set(members)) != len(members):
            raise ValueError(f"groups[{group!r}] names a task twice: {list(members)}")
    return {group: tuple(members) for group, members in groups.items()}


def choose(tasks: str | Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """``tasks`` as a tuple of names out of ``known``, in the order asked for."""
    if tasks is None:
        return tuple(known)
    if not isinstance(tasks, (str, Sequence)):
        raise TypeError(f"tasks must be a name or a sequence of names, got {type(tasks).__name__}")
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    unknown = [task for task in names if task not in known]
    if unknown or not names or len(set(names)) != len(names):
        problem = f"unknown task {unknown[0]!r}" if unknown else f"got {list(names)}"
        raise ValueError(f"tasks must be one or more different names out of {list(known)}: {problem}")
    return names


def check_task_of_row(task_of_row: Any, known: Sequence[str]) -> tuple[str, ...]:
    """The task of every row.

    Raises:
        TypeError: it is no sequence of names.
        ValueError: it names an unknown task.
    """
    is_names = isinstance(task_of_row, Sequence) and all(isinstance(task, str) for task in task_of_row)
    if isinstance(task_of_row, str) or not is_names:
        raise TypeError(f"task_of_row must be a sequence of task names, one for every row, got {task_of_row!r}")
    if unknown := [task for task in task_of_row if task not in known]:
        raise ValueError(f"task_of_row names the unknown task {unknown[0]!r}; tasks are {list(known)}")
    return tuple(task_of_row)
