"""``expand`` a model by a plan and ``collapse`` it again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from . import nested_tensors
from .block import BlockAdapter
from .block.folding import fold as fold_blocks
from .block.handover import adopt, draw_tokens
from .block.site import Site, find_attention
from .blocks import block_widths, check_batch_first, check_blocks, find_blocks, module_like
from .entry import Root
from .expanded import Expansion
from .interrupts import all_or_nothing
from .plan import ExpansionPlan
from .randomness import random_state, wind_back
from .sharded import shards
from .sharing import SHARED_PREFIX
from .streams import adapters, expansions
from .torch_private import is_compiled
from .wrappers import plan_for, unwrapped

MODULATORS = ("affine", "batch_norm")


@all_or_nothing
def expand(
    model_or_backbone: nn.Module,
    plan: ExpansionPlan,
    *,
    modulator: str = "affine",
    freeze_backbone: bool = False,
    shared_prefix: bool | str = "auto",
) -> Any:
    """Give the plan's blocks their tasks' modulations and tokens, in place.

    Added parameters are ``<block>.dtme.{weight,bias}.<task>`` (p,), starting as the identity, and
    ``<block>.dtme.tokens.<task>`` (t, p), normal with std 0.02, in the dtype and on the device of their block. Those
    that the tasks of a group share have the group's name instead. Every other name stays as it was.

    Args:
        model_or_backbone: a ``MultiTaskModel`` or any transformer.
        plan: from ``ConflictReport.plan`` or by hand. Its blocks may have the names of a model that PEFT, DDP or
            ``torch.compile`` is around, or was not yet around.
        modulator: ``"affine"``, or ``"batch_norm"`` (Table 11).
        freeze_backbone: train only what is added, and the heads (Table 12).
        shared_prefix: ``"auto"``: the blocks before the first difference run once for all tasks where the first call of
            its kind showed that all tasks then predict what each does alone; elsewhere the backbone runs once for every
            task, and a warning says why. ``True``: where that is not so, the call raises. ``False``: once for every
            task, always. Tasks that no block tells apart, those of a group say, run together in any case.

    Returns:
        The same object.

    Raises:
        RuntimeError: it is expanded already, or wrapped by DDP, FSDP or ``torch.compile``: expand first.
        ValueError: the plan is for another model (a missing block, another width, an unknown task, a group with the
            name of another task), or a block's attention cannot take task tokens correctly. The model is then as it
            was.
        TypeError: the model is no module, or ``plan`` no plan.
    """
    check_module(model_or_backbone)
    if not isinstance(plan, ExpansionPlan):
        raise TypeError(f"plan must be an ExpansionPlan, got {type(plan).__name__}")
    if modulator not in MODULATORS:
        raise ValueError(f"modulator must be one of {list(MODULATORS)}, got {modulator!r}")
    if not any(shared_prefix is known for known in SHARED_PREFIX) and shared_prefix != "auto":
        raise ValueError(f"shared_prefix must be one of {list(SHARED_PREFIX)}, got {shared_prefix!r}")
    refuse_wrapped(model_or_backbone)
    backbone, known = _parts(model_or_backbone)
    if adapters(backbone):
        raise RuntimeError(f"{type(backbone).__name__} is expanded already: call dtme.collapse(model) first")
    # a task that was not analysed runs in the stream it shares with every task that has no modules
    tasks = known or plan.tasks
    planned = PlannedBlocks.of(backbone, tasks, plan)
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    frozen = trained if freeze_backbone else None
    attach(backbone, planned, Expansion(tasks, planned.plan, modulator, shared_prefix, frozen))
    for name in frozen or ():
        backbone.get_parameter(name).requires_grad_(False)
    return model_or_backbone


@all_or_nothing
def collapse(model_or_backbone: nn.Module) -> Any:
    """Remove everything ``expand`` added: modules, hooks, frozen weights. The rest keeps what training gave it.

    Raises:
        RuntimeError: it is not expanded; or it is wrapped by DDP or FSDP.
        TypeError: it is no module.
    """
    check_module(model_or_backbone)
    backbone, _ = _parts(model_or_backbone)
    found = expansions(backbone)
    if not found:
        raise RuntimeError(f"{type(backbone).__name__} is not expanded: there is nothing to collapse")
    if (wrapper := parallel_wrapper(model_or_backbone)) is not None:
        raise RuntimeError(
            f"{wrapper[0] or type(model_or_backbone).__name__} is wrapped by {wrapper[1]}, which holds on to what "
            "expand added: collapse the model before that, or load what it saved into a plain one"
        )
    for expansion in found:
        if (root := root_of(backbone, expansion)) is not None:
            root.check()
    for expansion in found:
        module = detach(backbone, expansion) or backbone
        for name in expansion.frozen or ():
            module.get_parameter(name).requires_grad_(True)
    return model_or_backbone


class PlannedBlocks(NamedTuple):
    """What a plan is about in a backbone that can take it."""

    blocks: dict[str, nn.Module]
    """Every block that sees task streams, in forward order."""
    widths: dict[str, int]
    """Of those that get modules."""
    plan: ExpansionPlan
    """The plan, by the names that its blocks have in the backbone."""

    @classmethod
    def of(cls, backbone: nn.Module, tasks: Sequence[str], plan: ExpansionPlan) -> "PlannedBlocks":
        """ValueError where the plan is for another model."""
        if unknown := [task for task in plan.tasks if task not in tasks]:
            raise ValueError(f"plan names the unknown task {unknown[0]!r}; the model's tasks are {list(tasks)}")
        plan = plan_for(plan, [name for name, _ in backbone.named_modules()])
        blocks = _blocks_of(backbone, plan)
        return cls(blocks, {name: _width(name, blocks[name], plan) for name in plan.blocks}, plan)


def attach(
    backbone: nn.Module,
    planned: PlannedBlocks,
    expansion: Expansion,
    earlier: Mapping[str, BlockAdapter] | None = None,
) -> None:
    """Hang the modules of ``expansion`` on a backbone that has none of it, or leave it as it is and raise.

    What blocks of ``earlier`` had too, they go on with; random numbers are drawn for new task tokens only.
    """
    with torch.inference_mode(False):  # parameters made in inference mode could not be trained
        _attach_or_leave(backbone, planned, expansion, earlier or {})


def _attach_or_leave(
    backbone: nn.Module, planned: PlannedBlocks, expansion: Expansion, earlier: Mapping[str, BlockAdapter]
) -> None:
    blocks, widths, _ = planned
    # every block is probed before any is changed: probing calls it
    sites = {name: find_attention(name, blocks[name], widths[name]) for name in expansion.plan.expansion}
    _refuse_shared(sites, blocks)
    state = random_state()
    try:
        for adapter in _attach(blocks, sites, widths, expansion):
            before = earlier.get(adapter.name)
            if before is not None:
                adopt(adapter, before)
            draw_tokens(adapter, before)
        Root(backbone, expansion, expansion.plan.blocks).attach()
    except BaseException:
        detach(backbone, expansion)
        wind_back(state)
        raise


def fold(backbone: nn.Module, task: str, plain: bool) -> None:
    """Leave one task's stream of an expanded backbone, its task keys and values constants: what is exported."""
    for expansion in expansions(backbone):
        root = root_of(backbone, expansion)
        if root is not None:
            root.detach()
    nested_tensors.switch_off(backbone)  # blocks still have hooks
    fold_blocks(adapters(backbone), task, plain)


def check_module(model: Any) -> None:
    """TypeError where a model is asked for, and something else is given."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")


def _parts(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The backbone and its tasks; none for a bare one, and where a plan is the first to name them.

    Around either there may be PEFT, which is taken off again by others: what is inside of it is expanded.
    """
    from .model import MultiTaskModel

    model = unwrapped(model)
    return (unwrapped(model.backbone), model.tasks) if isinstance(model, MultiTaskModel) else (model, ())


def refuse_wrapped(model: nn.Module) -> None:
    """RuntimeError where a wrapper holds on to the parameters as they are."""
    compiled = ((name, "torch.compile") for name, module in model.named_modules() if is_compiled(module))
    parallel = ((name, "parallelize_module") for name, _ in shards(model))
    found = parallel_wrapper(model) or next(parallel, None) or next(compiled, None)
    if found is not None:
        raise RuntimeError(
            f"{found[0] or type(model).__name__} is wrapped by {found[1]} already: expand, or replan, the model before "
            "that. (What is expanded and sharded is saved by save_pretrained, loaded into a plain model, replanned "
            "there and sharded again.)"
        )


def parallel_wrapper(model: nn.Module) -> tuple[str, str] | None:
    """Name and class of what shares ``model``, or a part of it, among devices or processes."""
    known = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"}
    kinds = ((name, base.__name__) for name, module in model.named_modules() for base in type(module).__mro__)
    return next(((name, kind) for name, kind in kinds if kind in known), None)


def _blocks_of(backbone: nn.Module, plan: ExpansionPlan) -> dict[str, nn.Module]:
    """Every block that sees task streams, in forward order: those analysed, or else found, or at least the plan's."""
    modules, kind = dict(backbone.named_modules()), type(backbone).__name__
    for name in [*plan.blocks, *plan.num_features]:
        if name not in modules:
            raise ValueError(f"plan names block {name!r}, which {kind} does not have")
    try:
        found = find_blocks(backbone)
    except ValueError:
        found = {}
    check_blocks(modules, [*plan.blocks, *plan.num_features], found)
    for name in plan.blocks:
        if plan.num_features and name not in plan.num_features:
            raise ValueError(f"plan names block {name!r}, whose width its num_features leave out")
        if not plan.num_features and found and name not in found:
            raise ValueError(
                f"plan names {name!r}, which is not recognised as a block of {kind}; those are {list(found)}. If it is "
                "one, give its width in plan.num_features, or take the plan from dtme.analyze(..., blocks=[...])"
            )
    # a report knows the order in which its blocks ran; other blocks are taken in the order they are registered
    names = list(plan.num_features) or list(found) or [name for name in modules if name in plan.blocks]
    check_batch_first({name: modules[name] for name in names})
    return {name: modules[name] for name in names}


def _width(name: str, block: nn.Module, plan: ExpansionPlan) -> int:
    """What was measured beats what the block's layers suggest, unless all of them disagree."""
    planned, own = plan.num_features.get(name), block_widths(block)
    if planned is None and not own:
        raise ValueError(f"the width of block {name!r} ({type(block).__name__}) is not known: give plan.num_features")
    if planned is not None and own and planned not in own:
        raise ValueError(
            f"plan is for {planned} channels at block {name!r}, which has {own[0]}: it was made for another model"
        )
    return own[0] if planned is None else planned


def _refuse_shared(sites: dict[str, Site], blocks: dict[str, nn.Module]) -> None:
    """What joins the task tokens of one block must not run in another."""
    for name, site in sites.items():
        attention = site.seam.attention
        for other, block in blocks.items():
            if other != name and any(module is attention for module in block.modules()):
                raise ValueError(
                    f"blocks {name!r} and {other!r} share one {type(attention).__name__}, which the task tokens of "
                    "only one of them could join: modulate them instead, and leave them out of the plan's expansion"
                )


def _attach(
    blocks: dict[str, nn.Module], sites: dict[str, Site], widths: dict[str, int], expansion: Expansion
) -> Iterator[BlockAdapter]:
    """An adapter on every block from the first that the plan changes: later ones keep the streams apart too."""
    plan, names = expansion.plan, list(blocks)
    first = min((names.index(name) for name in plan.blocks), default=len(names) - 1)
    for name in names[first:]:
        block = blocks[name]
        block.dtme = adapter = BlockAdapter(name, block, expansion, widths.get(name))
        if name in widths:
            like = module_like(block).new_zeros(widths[name])
            adapter.add_modulation(plan.modulation.get(name, ()), like, expansion.modulator)
            if name in sites:
                adapter.add_tokens(plan.expansion[name], plan.num_tokens, like, sites[name])
        adapter.train(block.training)
        yield adapter


def root_of(backbone: nn.Module, expansion: Expansion) -> Root | None:
    """What ``expand`` hung on the module that it was given."""
    roots = (vars(module).get("_dtme") for module in backbone.modules())
    return next((root for root in roots if isinstance(root, Root) and root.expansion is expansion), None)


def detach(backbone: nn.Module, expansion: Expansion) -> nn.Module | None:
    """Take everything off; the module that was expanded, if it is still in ``backbone``."""
    root = root_of(backbone, expansion)
    if root is not None:
        root.detach()
    for adapter in adapters(backbone):
        if adapter.expansion is expansion:
            adapter.remove()
    return root.module[0] if root is not None else None
