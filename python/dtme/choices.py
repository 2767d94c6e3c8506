"""The tasks that somebody asked for, in this thread or asyncio task: ``with dtme.tasks``."""

from collections.abc import Sequence
from contextvars import ContextVar

from torch import nn

from .expanded import Expansion
from .plan import check_task_of_row, choose
from .streams import expansions

_choices: ContextVar[tuple["_Choice", ...]] = ContextVar("dtme_choices", default=())


class _Choice:
    """What one ``with dtme.tasks`` asked for, and the ``part`` of the backbone that was then called by itself."""

    def __init__(
        self, expansions: tuple[Expansion, ...], names: tuple[str, ...], task_of_row: tuple[str, ...] | None
    ) -> None:
        self.expansions, self.names, self.task_of_row = expansions, names, task_of_row
        self.part: str | None = None


def chosen(expansion: Expansion) -> tuple[tuple[str, ...], _Choice | None]:
    """The tasks this thread asked for by ``dtme.tasks``, else all; and where."""
    for choice in reversed(_choices.get()):
        if any(known is expansion for known in choice.expansions):
            return choice.names, choice
    return expansion.tasks, None


def chosen_by_row(expansion: Expansion) -> tuple[str, ...] | None:
    """The task of every row, where this thread asked for rows of several tasks by ``dtme.tasks``."""
    choice = chosen(expansion)[1]
    return None if choice is None else choice.task_of_row


def chosen_for_part(expansion: Expansion, part: str) -> tuple[str, ...]:
    """The tasks for which ``part`` of the backbone is called by itself.

    Of several tasks the rows that go in must be those of one stream. A second part may go on with what the first put
    out, and nothing tells: so there is one part in every ``with dtme.tasks``.
    """
    names, choice = chosen(expansion)
    if len(names) == 1:
        return names
    if choice is not None and choice.task_of_row is not None:
        raise RuntimeError(
            f"{part!r} was called outside of a call of the expanded backbone, for rows of several tasks: call the "
            "backbone itself, or one of its forward_* methods"
        )
    if choice is None or choice.part is not None:
        before = "" if choice is None else f" after {choice.part!r}"
        raise RuntimeError(
            f"{part!r} was called{before} outside of a call of the expanded backbone, so that dtme cannot know where a "
            f"forward of the tasks {list(names)} begins: call the backbone itself (or one of its forward_* methods), a "
            "MultiTaskModel with a function for features, one part in every `with dtme.tasks(...)`, or one task"
        )
    choice.part = part
    return names


class tasks:
    """Choose the streams of an expanded backbone that is called directly, in this thread (or asyncio task) alone.

    >>> with dtme.tasks(backbone, ["depth", "normals"]):
    ...     output = backbone(images)                     # 2 * B rows, task-major
    >>> dtme.split(output, ["depth", "normals"])["depth"]  # B rows

    Args:
        backbone: what ``expand`` was given, or anything that holds it or is held by it.
        names: a task or a sequence of tasks; the rows of the output follow their order.
        task_of_row: instead of ``names``, the task of every row: row i runs in the stream of its task alone, and the
            output has as many rows as the input, in its order. A row for every beam where ``generate`` makes several
            of one: ``[task for task in task_of_row for _ in range(num_beams)]``, also where an encoder reads that one
            just once before.

    A generator that yields inside of ``with dtme.tasks`` leaves its choice to whoever goes on: choose outside of it.

    Raises:
        RuntimeError: ``backbone`` is not expanded, or holds several that were expanded by themselves.
        ValueError: a name is unknown or given twice; ``names`` and ``task_of_row`` are given.
    """

    def __init__(
        self,
        backbone: nn.Module,
        names: str | Sequence[str] | None = None,
        *,
        task_of_row: Sequence[str] | None = None,
    ) -> None:
        if names is not None and task_of_row is not None:
            raise ValueError("give dtme.tasks the names of tasks, or task_of_row, the task of every row, not both")
        self.expansions = expansions(backbone)
        if len(self.expansions) > 1 and names is not None and not isinstance(names, str):
            raise RuntimeError(
                f"{type(backbone).__name__} holds {len(self.expansions)} backbones expanded by themselves, each "
                "of which would return the rows of all tasks: choose one task, or use a MultiTaskModel"
            )
        if not self.expansions:
            raise RuntimeError(f"{type(backbone).__name__} is not expanded: call dtme.expand(backbone, plan) first")
        known = self.expansions[0].tasks
        self.task_of_row = None if task_of_row is None else check_task_of_row(task_of_row, known)
        self.names = choose(tuple(dict.fromkeys(self.task_of_row)) if self.task_of_row else names, known)
        self._choices: list[_Choice] = []

    def __enter__(self) -> tuple[str, ...]:
        self._choices.append(_Choice(self.expansions, self.names, self.task_of_row))
        _choices.set((*_choices.get(), self._choices[-1]))
        return self.names

    def __exit__(self, *error: object) -> None:
        ended = self._choices.pop()
        _choices.set(tuple(choice for choice in _choices.get() if choice is not ended))
