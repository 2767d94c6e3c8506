"""Which parameters of a model are one task's alone, which several tasks share, and which of the added ones train."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .streams import adapters

if TYPE_CHECKING:
    from .block.adapter import BlockAdapter


def users_of_parameters(model: nn.Module, heads: Mapping[str, nn.Module]) -> list[tuple[nn.Parameter, set[str]]]:
    """Every parameter of ``model``, once, and the tasks that it belongs to: no task where all tasks may use it.

    A parameter of a head belongs to the head's task, one that ``expand`` added to the tasks of its owner. One that is
    used elsewhere too, tied to a weight of the backbone say, belongs to no task.
    """
    users: dict[int, set[str]] = {}
    for task, head in heads.items():
        for parameter in head.parameters():
            users.setdefault(id(parameter), set()).add(task)
    found = adapters(model)
    for adapter in found:
        for parameters in (adapter.weight, adapter.bias, adapter.tokens, adapter.gate):
            for owner, parameter in parameters.items():
                tasks = {task for task, own in adapter.own_tasks.items() if own == owner}
                users.setdefault(id(parameter), set()).update(tasks)
    known = {id(module) for part in (*heads.values(), *found) for module in part.modules()}
    elsewhere = (module for module in model.modules() if id(module) not in known)
    for module in elsewhere:
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = set()
    return [(parameter, users[id(parameter)]) for parameter in model.parameters()]


def unfreeze(model_or_backbone: nn.Module) -> Any:
    """Let all that ``expand`` added train, also where somebody has frozen it since, as PEFT does.

    ``get_peft_model`` freezes every parameter but those of its own adapters. Call this after it and before the
    optimizer is made.

    Returns:
        The same object.

    Raises:
        RuntimeError: it is not expanded.
    """
    found = adapters(model_or_backbone)
    if not found:
        raise RuntimeError(f"{type(model_or_backbone).__name__} is not expanded: there is nothing to unfreeze")
    for adapter in found:
        adapter.requires_grad_(True)
    return model_or_backbone


def is_frozen(found: "Sequence[BlockAdapter]") -> bool:
    """Whether nothing that ``expand`` added trains, though other parameters of its blocks do: an oversight."""
    is_empty = True
    for adapter in found:
        for parameter in adapter.parameters():
            if parameter.requires_grad:  # the first, as a rule: every forward in training asks
                return False
            is_empty = False
    if is_empty:
        return False
    return any(parameter.requires_grad for adapter in found for parameter in adapter._block[0].parameters())


def warn_of_frozen(found: "Sequence[BlockAdapter]", stacklevel: int) -> None:
    names = [f"{adapter.name}.dtme.{name}" for adapter in found for name, _ in adapter.named_parameters()]
    warnings.warn(
        f"nothing that dtme added trains: its {len(names)} parameters ({names[0]}, ...) are frozen, though others of "
        "the same blocks train. PEFT's get_peft_model freezes all that it finds: call dtme.unfreeze(model) after it, "
        "or expand after it",
        stacklevel=stacklevel + 1,
    )
