"""Modules that libraries put around others: what is inside, and what that is called from outside and from inside.

PEFT puts a model under ``base_model.model``, DistributedDataParallel under ``module``, ``torch.compile`` under
``_orig_mod``. A plan may have been made inside of such a wrapper and be used outside of it, or the other way round.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .plan import ExpansionPlan

PREFIXES = (
    ("base_model", "model"),
    ("module",),
    ("_orig_mod",),
    ("_fsdp_wrapped_module",),
    ("_checkpoint_wrapped_module",),
)


def unwrapped(module: nn.Module) -> nn.Module:
    """The model that PEFT was given, which its adapters now lie in; any other module itself."""
    while any(base.__module__.startswith("peft.") and base.__name__ == "PeftModel" for base in type(module).__mro__):
        module = module.get_base_model()  # type: ignore[operator]
    return module


def bare_name(name: str) -> str:
    """``name`` without what wrappers put into it."""
    parts, found = name.split("."), []
    while parts:
        skipped = next((prefix for prefix in PREFIXES if tuple(parts[: len(prefix)]) == prefix), ())
        if not skipped:
            found.append(parts[0])
        del parts[: len(skipped) or 1]
    return ".".join(found)


def resolve(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """The one of ``known`` that each of ``names`` means: itself, or the only one that differs by wrappers alone.

    Names that mean none, or more than one, are left out.
    """
    exact, by_bare_name = set(known), dict[str, list[str]]()
    for name in exact:
        by_bare_name.setdefault(bare_name(name), []).append(name)
    found: dict[str, str] = {}
    for name in names:
        meant = [name] if name in exact else by_bare_name.get(bare_name(name), [])
        if len(meant) == 1:
            found[name] = meant[0]
    return found


def plan_for(plan: ExpansionPlan, modules: Iterable[str]) -> ExpansionPlan:
    """``plan`` by the names that its blocks have among ``modules``; names that mean none of those stay."""
    names = list(dict.fromkeys([*plan.blocks, *plan.num_features]))
    found = resolve(names, modules)
    if len(set(found.values())) < len(found):  # two names of one module: they are told apart no longer
        return plan
    if all(new == old for old, new in found.items()):
        return plan

    def renamed(blocks: Mapping[str, Any]) -> dict[str, Any]:
        return {found.get(name, name): value for name, value in blocks.items()}

    return replace(
        plan,
        modulation=renamed(plan.modulation),
        expansion=renamed(plan.expansion),
        num_features=renamed(plan.num_features),
    )


def backbone_of(model: nn.Module) -> nn.Module:
    """What all tasks of a ``MultiTaskModel`` share; any other module itself."""
    from .model import MultiTaskModel

    return model.backbone if isinstance(model, MultiTaskModel) else model
