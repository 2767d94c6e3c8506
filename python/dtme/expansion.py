"""``expand`` a model by a plan and ``collapse`` it again."""

from typing import Any

from torch import nn

from .adapter import BlockAdapter
from .attention import Site, find_attention
from .blocks import block_widths, check_batch_first, check_blocks, find_blocks, module_like
from .plan import ExpansionPlan
from .streams import Streams

MODULATORS = ("affine", "batch_norm")


def expand(
    model_or_backbone: nn.Module, plan: ExpansionPlan, *, modulator: str = "affine", freeze_backbone: bool = False
) -> Any:
    """Give the plan's blocks their tasks' modulations and tokens, in place (method.md, section 4).

    Added parameters are ``<block>.dtme.{weight,bias}.<task>`` (p,), starting as the identity, and
    ``<block>.dtme.tokens.<task>`` (t, p), normal with std 0.02, in the dtype and on the device of their block. Every
    other name stays as it was.

    Args:
        model_or_backbone: a ``MultiTaskModel`` or any transformer.
        plan: from ``ConflictReport.plan`` or by hand.
        modulator: ``"affine"``, or ``"batch_norm"`` (Table 11).
        freeze_backbone: train only what is added, and the heads (Table 12).

    Returns:
        The same object.

    Raises:
        RuntimeError: it is expanded already, or wrapped by DDP, FSDP or ``torch.compile``: expand first.
        ValueError: the plan is for another model (a missing block, another width, an unknown task), or a block's
            attention cannot take task tokens correctly. The model is then as it was.
    """
    if not isinstance(plan, ExpansionPlan):
        raise TypeError(f"plan must be an ExpansionPlan, got {type(plan).__name__}")
    if modulator not in MODULATORS:
        raise ValueError(f"modulator must be one of {list(MODULATORS)}, got {modulator!r}")
    _refuse_wrapped(model_or_backbone)
    backbone, heads = _parts(model_or_backbone)
    if adapters(backbone):
        raise RuntimeError(f"{type(backbone).__name__} is expanded already: call dtme.collapse(model) first")
    # a head that was not analysed runs in the stream it shares with every task that has no modules
    tasks = heads or plan.tasks
    if unknown := [task for task in plan.tasks if task not in tasks]:
        raise ValueError(f"plan names the unknown task {unknown[0]!r}; the model has heads for {list(tasks)}")
    blocks = _blocks_of(backbone, plan)
    widths = {name: _width(name, blocks[name], plan) for name in plan.blocks}
    # every block is probed before any is changed: probing calls it
    sites = {name: find_attention(name, blocks[name], widths[name]) for name in plan.expansion}
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    frozen = trained if freeze_backbone else []
    streams = Streams(tasks, plan, modulator, frozen)
    try:
        _attach(blocks, sites, widths, streams)
    except BaseException:
        _detach(backbone)
        raise
    for name in frozen:
        backbone.get_parameter(name).requires_grad_(False)
    backbone._dtme = streams  # type: ignore[assignment]
    return model_or_backbone


def collapse(model_or_backbone: nn.Module) -> Any:
    """Remove everything ``expand`` added: modules, hooks, frozen weights. The rest keeps what training gave it.

    Raises:
        RuntimeError: it is not expanded.
    """
    backbone, _ = _parts(model_or_backbone)
    streams: Streams | None = getattr(backbone, "_dtme", None)
    if streams is None:
        raise RuntimeError(f"{type(backbone).__name__} is not expanded: there is nothing to collapse")
    _detach(backbone)
    for name in streams.frozen:
        backbone.get_parameter(name).requires_grad_(True)
    del backbone._dtme
    return model_or_backbone


def adapters(backbone: nn.Module) -> list[BlockAdapter]:
    return [module for module in backbone.modules() if isinstance(module, BlockAdapter)]


def _parts(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The backbone and the tasks that have heads; a bare backbone has none."""
    from .model import MultiTaskModel

    return (model.backbone, model.tasks) if isinstance(model, MultiTaskModel) else (model, ())


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kinds = {base.__name__ for base in type(module).__mro__}
        wrapper = kinds & {
            "DistributedDataParallel",
            "FullyShardedDataParallel",
            "FSDPModule",
            "OptimizedModule",
            "DataParallel",
        }
        if wrapper or module._compiled_call_impl is not None:
            what = wrapper.pop() if wrapper else "torch.compile"
            raise RuntimeError(
                f"{name or type(model).__name__} is wrapped by {what} already: expand the model before that"
            )


def _blocks_of(backbone: nn.Module, plan: ExpansionPlan) -> dict[str, nn.Module]:
    """Every block that sees task streams, in forward order: those analysed, or found, or at least those of the plan.

    Blocks that were not analysed but stand in one list with those that were keep the streams apart too: what else they
    take, a mask say, has to follow their rows. Blocks elsewhere, of a decoder or another tower, are left alone.
    """
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
    if not plan.num_features.keys() | set(plan.blocks) <= found.keys():
        found = {}  # the plan is about other blocks than those that can be found
    if plan.num_features:
        lists = {name.rpartition(".")[0] for name in plan.num_features}
        found = {name: block for name, block in found.items() if name.rpartition(".")[0] in lists}
    # a report knows the order in which its blocks ran; other blocks are taken in the order they are registered
    known = list(plan.num_features) if found.keys() <= plan.num_features.keys() else []
    names = known or [name for name in modules if name in found or name in plan.num_features or name in plan.blocks]
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


def _attach(blocks: dict[str, nn.Module], sites: dict[str, Site], widths: dict[str, int], streams: Streams) -> None:
    """An adapter on every block from the first that the plan changes: later ones keep the streams apart too."""
    plan, names = streams.plan, list(blocks)
    first = min((names.index(name) for name in plan.blocks), default=len(names) - 1)
    adapter: BlockAdapter | None = None
    for name in names[first:]:
        block = blocks[name]
        block.dtme = adapter = BlockAdapter(name, block, streams, adapter)
        if name in widths:
            like = module_like(block).new_zeros(widths[name])
            adapter.add_modulation(plan.modulation.get(name, ()), like, streams.modulator)
            if name in sites:
                adapter.add_tokens(plan.expansion[name], plan.num_tokens, like, sites[name])
    if adapter is not None:
        adapter.close()


def _detach(backbone: nn.Module) -> None:
    for adapter in adapters(backbone):
        adapter.remove()
