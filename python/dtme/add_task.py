"""A task that comes later: ``add_task`` to a model that may be expanded, and in the middle of its training."""

from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from .block.handover import begin_like
from .entry import Root
from .expanded import Expansion
from .expansion import PlannedBlocks, refuse_wrapped
from .interrupts import all_or_nothing
from .model import MultiTaskModel
from .plan import ExpansionPlan, check_tasks, choose
from .randomness import random_state, wind_back
from .replan import (
    added_parameters,
    check_optimizer,
    exchange,
    group_of_most,
    only_root,
    undone_on_error,
    update_optimizer,
)
from .streams import adapters, is_expanded


@all_or_nothing
def add_task(
    model: MultiTaskModel,
    task: str,
    head: nn.Module,
    like: str | None = None,
    optimizer: Optimizer | None = None,
) -> MultiTaskModel:
    """Give a model one more task, in place, without touching a bit of the others' parameters.

    Args:
        model: as it is, or expanded.
        task: a name that no task and no group of the plan has.
        head: what predicts it. It stays where it is, in its dtype.
        like: a task whose modules the new one begins with copies of: a modulation and task tokens, with their gates and
            statistics, in each block where that task has some, be it alone or in a group. None: the new task has no
            modules, and runs in the stream that all such tasks share; ``replan`` gives it some.
        optimizer: the one that trains the model. New modules join the groups that ``replan`` would put them in, the
            head that of most of the other heads; the state of all others stays. None where there is no optimizer yet.

    Returns:
        The same model. Plans and reports made before do not know the task; ``from_pretrained`` of a save made before
        is for the tasks of then.

    Raises:
        ValueError: the name is taken or unfit; ``like`` is unknown; the optimizer does not hold the model's parameters.
        TypeError: ``model`` is no MultiTaskModel, ``head`` no module.
        RuntimeError: the model is wrapped by DDP, FSDP or ``torch.compile``: add the task to what is inside, and wrap
            that anew; or it has a decoder, which would have to predict the task too.

        Model, optimizer and random state are then as they were.
    """
    if not isinstance(model, MultiTaskModel):
        raise TypeError(f"model must be a dtme.MultiTaskModel, got {type(model).__name__}")
    if not isinstance(head, nn.Module):
        raise TypeError(f"head must be a torch.nn.Module, got {type(head).__name__}")
    if model.decoder is not None:
        raise RuntimeError("a model with a decoder cannot be given a task: the decoder would have to predict it, too")
    refuse_wrapped(model)
    tasks = check_tasks([*model.tasks, task])
    if like is not None:
        (like,) = choose(like, model.tasks)
    root = only_root(model) if is_expanded(model.backbone) else None
    earlier = added_parameters(model)
    if optimizer is not None:
        backbone = model.backbone if root is None else root.module[0]
        check_optimizer(optimizer, model, backbone, earlier, may_add=root is not None and like is not None)
    with undone_on_error(model, optimizer):
        if root is not None:
            _add_modules(root, tasks, task, like)
            if optimizer is not None:
                update_optimizer(optimizer, model, root.module[0], earlier)
        if optimizer is not None:
            _add_head(optimizer, model, task, head)
        model.add_head(task, head)
    return model


def _add_modules(root: Root, tasks: tuple[str, ...], task: str, like: str | None) -> None:
    backbone, old = root.module[0], root.expansion
    plan = with_task(old.plan, task, like)
    planned = PlannedBlocks.of(backbone, tasks, plan)
    new = Expansion(tasks, planned.plan, old.modulator, old.shared_prefix, old.frozen)
    state = random_state()
    exchange(backbone, planned, old, new, gate_tokens=False)
    with torch.inference_mode(False):
        for adapter in adapters(backbone):
            if like is not None and like in adapter.own_tasks and task in adapter.own_tasks:
                begin_like(adapter, task, adapter.own_tasks[like])
    wind_back(state)  # task tokens were drawn, of which none is left


def with_task(plan: ExpansionPlan, task: str, like: str | None) -> ExpansionPlan:
    """The plan with one more task, which has what ``like`` has, by itself."""

    def grown(blocks: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return {block: (*tasks, task) if like in tasks else tasks for block, tasks in blocks.items()}

    modulation, expansion = grown(dict(plan.modulation)), grown(dict(plan.expansion))
    return replace(plan, tasks=(*plan.tasks, task), modulation=modulation, expansion=expansion)


def _add_head(optimizer: Optimizer, model: MultiTaskModel, task: str, head: nn.Module) -> None:
    """Parameters of ``head`` that nobody trains yet join the group of most of the heads, or of the backbone."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    new = {name: parameter for name, parameter in head.named_parameters() if id(parameter) not in held}
    if not new:
        return
    index = group_of_most(optimizer, model, model.heads, range(len(optimizer.param_groups)))
    assert index is not None  # an optimizer that holds none of the model's parameters is refused
    group = optimizer.param_groups[index]
    group["params"].extend(new.values())
    if "param_names" in group:
        group["param_names"].extend(f"heads.{task}.{name}" for name in new)
