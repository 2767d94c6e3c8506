"""Which parameters of a model are one task's alone, and which several tasks share."""

from collections.abc import Mapping

from torch import nn

from .streams import adapters


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
