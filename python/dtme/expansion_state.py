"""What a model was expanded by, as plain data: for checkpoints whose files another library writes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .block.handover import add_gates
from .checks import Check, Record, boolean, list_of, mapping_of, one_of, text
from .expanded import Expansion
from .expansion import MODULATORS, collapse, expand
from .interrupts import all_or_nothing
from .plan import check_plan
from .randomness import random_state, wind_back
from .sharing import SHARED_PREFIX
from .streams import adapters, expansions
from .wrappers import backbone_of, resolve, unwrapped

CHECKS: dict[str, Check] = {
    "plan": check_plan,
    "modulator": one_of(*MODULATORS),
    "freeze_backbone": boolean,
    "shared_prefix": one_of(*SHARED_PREFIX),
    "gates": mapping_of(list_of(text)),
}
"""All that is kept of an expansion beside its tensors."""
NOT_EXPANDED: dict[str, Any] = {
    "plan": None,
    "modulator": "affine",
    "freeze_backbone": False,
    "shared_prefix": "auto",
    "gates": {},
}
"""What files say of a model that is not expanded."""


def expansion_state(model_or_backbone: nn.Module) -> dict[str, Any]:
    """The plan of an expanded model and how it was carried out; empty for a model that is not expanded.

    It goes into a checkpoint beside ``model.state_dict()``, as JSON or by ``torch.save``; ``load_expansion_state``
    makes of a plain model one that takes that state dict. ``MultiTaskModel.save_pretrained`` does all of it by itself.

    Raises:
        RuntimeError: parts of the model were expanded by themselves, or it was wrapped after that.
    """
    return state_of(backbone_of(model_or_backbone))


def state_of(backbone: nn.Module) -> dict[str, Any]:
    """``expansion_state`` of a ``MultiTaskModel``'s backbone."""
    expansion = _only_expansion(backbone)
    if expansion is None:
        return {}
    return {
        "plan": expansion.plan.as_dict(),
        "modulator": expansion.modulator,
        "freeze_backbone": expansion.frozen is not None,
        "shared_prefix": expansion.shared_prefix,
        "gates": {adapter.name: list(adapter.gate) for adapter in adapters(backbone) if adapter.gate},
    }


def _only_expansion(backbone: nn.Module) -> Expansion | None:
    """RuntimeError where the backbone was not expanded as the whole that ``load`` will be given."""
    found = expansions(backbone)
    modules = dict(unwrapped(backbone).named_modules())
    at_home = all(modules.get(f"{adapter.name}.dtme") is adapter for adapter in adapters(backbone))
    if len(found) > 1 or not at_home:
        raise RuntimeError(
            f"{type(backbone).__name__} was wrapped, or built of parts, after they were expanded: a saved plan has "
            "to name the blocks of the backbone itself. Save what was expanded, or expand the whole"
        )
    return next(iter(found), None)


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
    if not isinstance(state, Mapping):
        raise ValueError(f"state must be what dtme.expansion_state(model) returned, got {state!r}")
    try:
        content = Record(CHECKS)(dict(state)) if state else {}
    except ValueError as error:
        raise ValueError(f"state must be what dtme.expansion_state(model) returned: {error}") from error
    kind, present = type(model_or_backbone).__name__, expansion_state(model_or_backbone)
    if present:
        found, want = defining(present), defining(state)
        differing = [name for name in found if found[name] != want.get(name)]
        if differing:
            raise RuntimeError(
                f"{kind} is expanded in another way than the model that is loaded: they differ in {differing}. Begin "
                "with a model that is not expanded, or is by the same plan"
            )
    elif state:
        random = random_state()  # of a run that goes on; what expand draws is replaced by what is loaded
        expand_by(model_or_backbone, content)
        wind_back(random)
    return model_or_backbone


def expand_by(model_or_backbone: nn.Module, state: Mapping[str, Any]) -> None:
    """Expand a plain model by what ``state_of``, or a file, says, its fields made into what they stand for.

    Raises:
        ValueError: as ``expand``; or gates are for what has no task tokens. The model is then as it was.
    """
    # what early saves lack
    shared_prefix = state.get("shared_prefix", NOT_EXPANDED["shared_prefix"])
    expand(
        model_or_backbone,
        state["plan"],
        modulator=state["modulator"],
        freeze_backbone=state["freeze_backbone"],
        shared_prefix=shared_prefix,
    )
    try:
        _add_gates(backbone_of(model_or_backbone), state.get("gates", {}))
    except BaseException:
        collapse(model_or_backbone)
        raise


def _add_gates(backbone: nn.Module, gates: Mapping[str, list[str]]) -> None:
    """Give task tokens the gates that ``replan`` had given them."""
    found = {adapter.name: adapter for adapter in adapters(backbone)}
    names = resolve(gates, found)
    for block, owners in gates.items():
        block = names.get(block, block)
        if block not in found or not set(owners) <= set(found[block].tokens):
            raise ValueError(f"gates of block {block!r} are for {owners}, which have no task tokens")
        add_gates(found[block], owners)


def defining(state: Mapping[str, Any]) -> dict[str, Any]:
    """What parameters and their meaning depend on: not so the widths of blocks, which plans by hand leave out."""
    if not state:
        return {}
    plan = {name: value for name, value in state["plan"].items() if name != "num_features"}
    return plan | {"modulator": state["modulator"], "gates": state.get("gates", {})}
