"""What an expanded backbone returns when it is called directly: the rows of all tasks, taken apart again."""

import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor

from .plan import choose
from .trees import map_tensors, tensors

_returned: ContextVar[tuple[tuple[str, ...], tuple["weakref.ref[Tensor]", ...]]] = ContextVar(
    "dtme_returned", default=((), ())
)


def remember_tasks(output: Any, tasks: tuple[str, ...]) -> None:
    """``output`` was returned in this thread and holds the rows of ``tasks``, in this order."""
    _returned.set((tasks, tuple([weakref.ref(tensor) for tensor in tensors(output)])))


def split(output: Any, tasks: str | Sequence[str]) -> dict[str, Any]:
    """Take the task-major batch apart that an expanded backbone returns.

    Args:
        output: a tensor (K * B, ...), or any nesting of sequences, mappings and model outputs of such tensors.
        tasks: the K names that ran, in the order they were chosen.

    Returns:
        ``{task: output}`` with B rows each; views, nothing is copied. A tensor without dimensions belongs to all.

    Raises:
        ValueError: a tensor's rows are no multiple of K, or the backbone has just returned it for other tasks.
    """
    names = choose(tasks, (tasks,) if isinstance(tasks, str) else tuple(tasks or ()))
    ran, references = _returned.get()
    known = {id(tensor) for reference in references if (tensor := reference()) is not None}
    if names != ran and any(id(tensor) in known for tensor in tensors(output)):
        raise ValueError(f"tasks must be {list(ran)}, whose rows output holds in this order, got {list(names)}")

    def part(index: int, tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor
        num_rows, rest = divmod(tensor.shape[0], len(names))
        if rest:
            raise ValueError(f"output of shape {tuple(tensor.shape)} does not hold the rows of {len(names)} tasks")
        return tensor[index * num_rows : (index + 1) * num_rows]

    return {task: map_tensors(partial(part, i), output) for i, task in enumerate(names)}
