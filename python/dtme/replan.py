"""Go on with another plan: ``replan`` an expanded model in the middle of its training."""

import copy
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .block.adapter import ADDED, is_added
from .block.handover import add_gates, new_tokens
from .entry import Root
from .expanded import Expansion
from .expansion import PlannedBlocks, attach, check_module, detach, refuse_wrapped, root_of
from .interrupts import all_or_nothing
from .plan import ExpansionPlan
from .randomness import random_state, wind_back
from .streams import adapters, expansions


@all_or_nothing
def replan(
    model_or_backbone: nn.Module,
    plan: ExpansionPlan,
    optimizer: Optimizer | None = None,
    *,
    gate_tokens: bool = False,
) -> Any:
    """Let an expanded model go on with another plan, in place, as after a second analysis in the middle of training.

    Modulator, shared prefix and freezing stay what ``expand`` was told. What is in both plans (the same kind of module
    of the same task, or of a group of the same name, in the same block) keeps its very parameters, and so its optimizer
    state, and its statistics. What is new starts as in ``expand``: modulations as the identity, task tokens drawn.
    Where ``num_tokens`` differs all tokens are new. What left the plan leaves the model.

    Args:
        model_or_backbone: what ``expand`` was given, or a ``MultiTaskModel`` around it.
        plan: the new one, for the same model; it may change other blocks.
        optimizer: the one that trains the model. Parameters that leave the model leave it and its state; the state of
            all others stays. New ones join a group that there is, so that schedulers go on: that of earlier added ones,
            also one that is empty, or else one without weight decay. Where there is neither, they get a group of their
            own without weight decay, with what else the group of most of the backbone has now, and a warning says how
            to go on with a scheduler. None where there is no optimizer yet.
        gate_tokens: begin new task tokens without effect, so that the model's function does not change by them: what
            the attention puts out is that without them plus ``gate`` times what they change in it, ``gate`` being
            ``<block>.dtme.gate.<task>``, a learnable scalar that starts at 0. Its gradient is there at once, that of
            the tokens once it has moved. A block then attends twice for its gated tasks, and its first half does not
            run as one operation; tokens without a gate, such as earlier ones, cost what they did. A gate belongs to
            its tokens and stays as long as they do. To load weights with gates into a model by ``load_state_dict``,
            replan it first as that one was; ``from_pretrained`` does.

    Returns:
        The same object.

    Raises:
        RuntimeError: it is not expanded, or not as a whole; or it is wrapped by DDP, FSDP or ``torch.compile``, which
            know its parameters as they are: replan what is inside, and wrap that anew.
        ValueError: the plan is for another model (a missing block, another width, an unknown task); a block's attention
            cannot take task tokens correctly; or the optimizer does not hold the model's parameters.
        TypeError: the model, ``plan`` or ``optimizer`` is of another class.

        The model, the optimizer and the random state are then as they were.
    """
    check_module(model_or_backbone)
    if not isinstance(plan, ExpansionPlan):
        raise TypeError(f"plan must be an ExpansionPlan, got {type(plan).__name__}")
    refuse_wrapped(model_or_backbone)
    root = only_root(model_or_backbone)
    backbone, old = root.module[0], root.expansion
    planned = PlannedBlocks.of(backbone, old.tasks, plan)
    new = Expansion(old.tasks, planned.plan, old.modulator, old.shared_prefix, old.frozen)
    earlier = added_parameters(model_or_backbone)
    if optimizer is not None:
        check_optimizer(optimizer, model_or_backbone, backbone, earlier, may_add=bool(plan.blocks))
    with undone_on_error(backbone, optimizer):
        exchange(backbone, planned, old, new, gate_tokens)
        if optimizer is not None:
            update_optimizer(optimizer, model_or_backbone, backbone, earlier)
    return model_or_backbone


def only_root(model: nn.Module) -> Root:
    """Where the one expansion in ``model`` hangs, whole and untouched."""
    kind, found = type(model).__name__, expansions(model)
    if not found:
        raise RuntimeError(f"{kind} is not expanded: call dtme.expand(model, plan) first")
    if len(found) > 1:
        raise RuntimeError(f"{kind} holds {len(found)} backbones expanded by themselves: replan one after the other")
    root = root_of(model, found[0])
    if root is None:
        raise RuntimeError(f"{kind} is a part of what was expanded: replan the whole")
    root.check()
    modules = dict(root.module[0].named_modules())
    for adapter in adapters(model):
        if modules.get(f"{adapter.name}.dtme") is not adapter:
            raise RuntimeError(
                f"block {adapter.name!r} of {type(root.module[0]).__name__} was wrapped, moved or replaced after it "
                "was expanded: undo that first"
            )
    return root


def exchange(backbone: nn.Module, planned: PlannedBlocks, old: Expansion, new: Expansion, gate_tokens: bool) -> None:
    """The adapters of ``new`` for those of ``old``, with the parameters that both have."""
    before = {adapter.name: adapter for adapter in adapters(backbone)}
    detach(backbone, old)
    attach(backbone, planned, new, before)
    with torch.inference_mode(False):
        for adapter in adapters(backbone) if gate_tokens else ():
            add_gates(adapter, new_tokens(adapter, before.get(adapter.name)))
    new.has_warned_of_rows = old.has_warned_of_rows


# --- the optimizer ----------------------------------------------------------------------------------------------------


def added_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if is_added(name)}


def check_optimizer(
    optimizer: Any, model: nn.Module, backbone: nn.Module, earlier: dict[str, nn.Parameter], *, may_add: bool
) -> None:
    """Refuse what does not train the model; warn where added parameters would need a new group."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer must not be LBFGS, whose state is of all parameters together: make a new one")
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ValueError(f"optimizer ({kind}) holds none of the model's parameters: give the one that trains it")
    for name, parameter in earlier.items():
        if parameter.requires_grad and id(parameter) not in held:
            raise ValueError(
                f"optimizer ({kind}) does not hold {name!r}, which expand added: give the one that trains it"
            )
    if may_add and _home(optimizer, model, backbone, earlier) is None:
        _warn_of_new_group(optimizer, model, backbone)


def update_optimizer(
    optimizer: Optimizer, model: nn.Module, backbone: nn.Module, earlier: dict[str, nn.Parameter]
) -> None:
    now = added_parameters(model)
    known, kept = {id(p) for p in earlier.values()}, {id(p) for p in now.values()}
    gone = {id(p): p for p in earlier.values() if id(p) not in kept}
    if new := {name: parameter for name, parameter in now.items() if id(parameter) not in known}:
        home = _home(optimizer, model, backbone, earlier)
        if home is None:
            home = _add_group(optimizer, model, backbone)
        names = {id(p): name for name, p in earlier.items()}
        groups = [_group_for(name, optimizer.param_groups, names) for name in new]
        named = any("param_names" in group for group in optimizer.param_groups)
        for (name, parameter), index in zip(new.items(), groups, strict=True):
            group = optimizer.param_groups[home if index is None else index]
            group["params"].append(parameter)
            if named:
                group["param_names"].append(name)
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        stay = [i for i, parameter in enumerate(group["params"]) if id(parameter) not in gone]
        for key in ("params", "param_names") if "param_names" in group else ("params",):
            group[key][:] = [group[key][i] for i in stay]


def _group_for(name: str, groups: list[dict[str, Any]], names: dict[int, str]) -> int | None:
    """Which of the groups with earlier added parameters a new one joins: best that of its own task and kind."""
    kind, owner = _kind_and_owner(name)
    best, found = 0, None
    for i, group in enumerate(groups):
        others = [_kind_and_owner(names[id(p)]) for p in group["params"] if id(p) in names]
        score = max((1 + (k == kind) + 2 * (o == owner) for k, o in others), default=0)
        if score > best:
            best, found = score, i
    return found


def _kind_and_owner(name: str) -> tuple[str, str]:
    kind, _, owner = name.rpartition(ADDED)[2].partition(".")
    return kind, owner


def _home(optimizer: Optimizer, model: nn.Module, backbone: nn.Module, earlier: dict[str, nn.Parameter]) -> int | None:
    """A group of added parameters, or one that is empty, or one of the model's that is without weight decay, if any."""
    groups, added = optimizer.param_groups, {id(p) for p in earlier.values()}
    for i, group in enumerate(groups):
        if any(id(p) in added for p in group["params"]):
            return i
    empty = [i for i, group in enumerate(groups) if not group["params"]]
    free = [i for i, group in enumerate(groups) if group["params"] and not group.get("weight_decay", 0)]
    return empty[0] if empty else group_of_most(optimizer, model, backbone, free)


def group_of_most(optimizer: Optimizer, model: nn.Module, backbone: nn.Module, among: Iterable[int]) -> int | None:
    """The one of the groups that holds most of the backbone, or else of the model; None where none holds any of it."""
    most, found = (0, 0), None
    inner, whole = ({id(p) for p in module.parameters()} for module in (backbone, model))
    for i in among:
        parameters = optimizer.param_groups[i]["params"]
        inside, held = (sum(p.numel() for p in parameters if id(p) in own) for own in (inner, whole))
        if (inside, held) > most:
            most, found = (inside, held), i
    return found


def _add_group(optimizer: Optimizer, model: nn.Module, backbone: nn.Module) -> int:
    """An empty group with the values of that of most of the backbone, as a schedule has left them, but no decay."""
    like = group_of_most(optimizer, model, backbone, range(len(optimizer.param_groups)))
    assert like is not None  # an optimizer that holds none of the model's parameters is refused
    lists = ("params", "param_names")
    group = {k: [] if k in lists else copy.deepcopy(v) for k, v in optimizer.param_groups[like].items()}
    optimizer.add_param_group({**group, "weight_decay": 0.0})
    return len(optimizer.param_groups) - 1


def _warn_of_new_group(optimizer: Optimizer, model: nn.Module, backbone: nn.Module) -> None:
    like = group_of_most(optimizer, model, backbone, range(len(optimizer.param_groups)))
    warnings.warn(
        f"no group of the optimizer ({type(optimizer).__name__}) is without weight decay: the added parameters get a "
        f"new one with the present values of group {like}. A learning-rate scheduler made before has a value for each "
        "of the earlier groups and fails at its next step: make a new one that goes on from there, such as "
        "LambdaLR(optimizer, f, last_epoch=scheduler.last_epoch). To need none, give the optimizer an empty group for "
        "them from the start, as MultiTaskModel.parameter_groups() of an expanded model does",
        stacklevel=5,
    )


# --- all or nothing ---------------------------------------------------------------------------------------------------


@contextmanager
def undone_on_error(backbone: nn.Module, optimizer: Optimizer | None) -> Iterator[None]:
    """On any error every module of ``backbone``, ``optimizer`` and the random state are as before."""
    modules = [(module, dict(vars(module))) for module in backbone.modules()]
    containers = [value for _, attributes in modules for value in attributes.values()]
    if optimizer is not None:
        containers += [optimizer.state, optimizer.param_groups, *optimizer.param_groups]
        containers += [value for group in optimizer.param_groups for value in group.values()]
    # hooks, children and groups are kept in containers that others hold on to: they get their contents back
    contents = [(one, one.copy()) for one in containers if type(one) in (dict, OrderedDict, defaultdict, list, set)]
    state = random_state()
    try:
        yield
    except BaseException:
        for module, attributes in modules:
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in contents:
            container.clear()
            getattr(container, "extend" if isinstance(container, list) else "update")(content)
        wind_back(state)
        raise
