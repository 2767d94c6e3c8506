"""What a model was expanded by, as plain data: for checkpoints whose files another library writes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .expansion import collapse, expand
from .interrupts import all_or_nothing
from .model import MultiTaskModel
from .plan import ExpansionPlan
from .randomness import random_state, wind_back
from .saving import _add_gates, _only_expansion
from .streams import adapters

FIELDS = {"plan", "modulator", "freeze_backbone", "shared_prefix", "gates"}


def expansion_state(model_or_backbone: nn.Module) -> dict[str, Any]:
    """The plan of an expanded model and how it was carried out; empty for a model that is not expanded.

    It goes into a checkpoint beside ``model.state_dict()``, as JSON or by ``torch.save``; ``load_expansion_state``
    makes of a plain model one that takes that state dict. ``MultiTaskModel.save_pretrained`` does all of it by itself.

    Raises:
        RuntimeError: parts of the model were expanded by themselves, or it was wrapped after that.
    """
    backbone = _backbone_of(model_or_backbone)
    expansion = _only_expansion(backbone)
    if expansion is None:
        return {}
    return {
        "plan": expansion.plan.as_dict(),
        "modulator": expansion.modulator,
        "freeze_backbone": bool(expansion.frozen),
        "shared_prefix": expansion.shared_prefix,
        "gates": {adapter.name: list(adapter.gate) for adapter in adapters(backbone) if adapter.gate},
    }


@all_or_nothing
def load_expansion_state(model_or_backbone: nn.Module, state: Mapping[str, Any]) -> Any:
    """Expand a plain model as another was; its values are those of ``expand`` until its state dict is loaded.

    Nothing happens to a model that is expanded in this way already, so that a run that goes on may call it as well.

    Returns:
        The same object.

    Raises:
        RuntimeError: the model is expanded in another way.
        ValueError: ``state`` is not what ``expansion_state`` returned; or as ``expand``. The model is then as it was.
    """
    if (
        not isinstance(state, Mapping)
        or (state and set(state) != FIELDS)
        or not isinstance(state.get("plan", {}), Mapping)
    ):
        raise ValueError(f"state must be what dtme.expansion_state(model) returned, got {state!r}")
    backbone, kind = _backbone_of(model_or_backbone), type(model_or_backbone).__name__
    present = expansion_state(model_or_backbone)
    if present:
        found, want = defining(present), defining(state)
        differing = [name for name in found if found[name] != want.get(name)]
        if differing:
            raise RuntimeError(
                f"{kind} is expanded in another way than the model that is loaded: they differ in {differing}. Begin "
                "with a model that is not expanded, or is by the same plan"
            )
    elif state:
        options = {name: state[name] for name in ("modulator", "freeze_backbone", "shared_prefix")}
        random = random_state()  # of a run that goes on; what expand draws is replaced by what is loaded
        expand(model_or_backbone, _plan_of(state), **options)
        wind_back(random)
        try:
            _add_gates("what is loaded", backbone, state["gates"])
        except BaseException:
            collapse(model_or_backbone)
            raise
    return model_or_backbone


def defining(state: Mapping[str, Any]) -> dict[str, Any]:
    """What parameters and their meaning depend on: not so the widths of blocks, which plans by hand leave out."""
    if not state:
        return {}
    plan = {name: value for name, value in state["plan"].items() if name != "num_features"}
    return plan | {"modulator": state["modulator"], "gates": state.get("gates", {})}


def _plan_of(state: Mapping[str, Any]) -> ExpansionPlan:
    try:
        return ExpansionPlan(**state["plan"])
    except TypeError as error:
        raise ValueError(f"the state's plan is not one: {error}") from error


def _backbone_of(model: nn.Module) -> nn.Module:
    return model.backbone if isinstance(model, MultiTaskModel) else model
