"""Rows of ``distributed`` about FSDP2: what is expanded, then sharded by ``fully_shard``, against one process."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import dtme

from .processes import (
    TASKS,
    WIDTH,
    Block,
    Mixing,
    Transformer,
    alone,
    blocks_of,
    counts_that_differ,
    gradients,
    input_of,
    labelled,
    largest_difference,
    loss_of,
    mean_gradients,
    model_of,
    on_all,
    timm_vit,
    transformers_vit,
    whole,
)
from .situation import difference, largest

Backbone = Callable[[], nn.Module]
Shard = Callable[[Any], object]


def every_block(model: Any, **options: Any) -> None:
    """The usual recipe: each block, then what is left."""
    for block in blocks_of(model).values():
        fully_shard(block, **options)
    fully_shard(model, **options)


def replicated(model: Any) -> None:
    """On a mesh of two dimensions."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
    every_block(model, mesh=mesh)


def backbone_alone(model: Any) -> None:
    fully_shard(model.backbone)


def heads_too(model: Any) -> None:
    for head in model.heads.values():
        fully_shard(head)
    every_block(model)


def trained(
    rank: int,
    shard: Shard,
    backbone: Backbone = Transformer,
    prepare: Shard = lambda model: None,
    labels: Sequence[Sequence[str]] | None = None,
    rows: Sequence[int] = (3, 3),
) -> float:
    """Two backward passes, and a forward in evaluation before them, of ranks with data, and labels, of their own."""
    model = model_of(backbone)
    world = dist.get_world_size()
    some = labels or [TASKS] * world
    losses = [
        partial(lambda i, net: loss_of(labelled(net(input_of(backbone, i, rows[i % 2])), some[i])), i)
        for i in range(world)
    ]
    want = mean_gradients(model, losses)
    prepare(model)
    shard(model)
    with torch.no_grad():
        model.eval()(input_of(backbone, 0))
        model.train()
    found = 0.0
    for _ in range(2):
        model.zero_grad()
        losses[rank](model).backward()
        mine = gradients(model)
        if shard is backbone_alone:  # heads are not its own: whoever does so adds them up
            mine |= {name: _summed(value) / world for name, value in mine.items() if name.startswith("heads.")}
        found = max(found, largest_difference(mine, want))
    return on_all(found)


def _summed(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def checkpointed(model: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))


def compiled(model: Any) -> None:
    list(blocks_of(model).values())[1].compile(backend="eager")


def mixed_precision(rank: int) -> float:
    """bfloat16 for what is gathered; parameters, and those that were added, stay in float32."""
    model, plain = model_of().float(), model_of().float()
    every_block(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    x = input_of(Transformer, rank).float()
    found = model(x)
    loss_of({task: value.float() for task, value in found.items()}).backward()
    if any(p.dtype != torch.float32 or p.grad.dtype != torch.float32 for p in model.parameters()):
        return float("inf")
    return on_all(max(difference(found[task], value) for task, value in plain(x).items()))


def three_steps(rank: int) -> float:
    """Of Adam, with the groups that the model gives."""
    model, plain = model_of(), model_of()
    every_block(model)
    ours, other = (torch.optim.Adam(net.parameter_groups(lr=1e-2)) for net in (model, plain))
    for step in range(3):
        ours.zero_grad()
        other.zero_grad()
        loss_of(model(input_of(Transformer, 2 * step + rank))).backward()
        for i in range(2):
            (loss_of(plain(input_of(Transformer, 2 * step + i))) / 2).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            if q.grad is not None and q.grad.abs().max() < 1e-12:  # rounding alone, of which Adam makes a step
                p.grad, q.grad = None, None
        ours.step()
        other.step()
    return on_all(largest({n: whole(v) for n, v in model.state_dict().items()}, dict(plain.state_dict())))


def saved(rank: int) -> float:
    """Saved by all ranks, loaded into a plain model, tied weights and all."""
    model, plain = model_of(), model_of()
    for net in (model, plain):
        net.heads["depth"].weight = net.heads["semseg"].weight
    every_block(model)
    folder = _folder()
    model.save_pretrained(folder)
    heads: dict[str, nn.Module] = {task: nn.Linear(WIDTH, 2).double() for task in TASKS}
    heads["depth"].weight = heads["semseg"].weight
    loaded = dtme.MultiTaskModel.from_pretrained(folder, Transformer().double(), heads)
    found = largest(dict(loaded.state_dict()), dict(plain.state_dict()))
    x = input_of(Transformer, 9)
    return on_all(max(found, largest(loaded(x), plain(x)), largest(_of(model(x)), plain(x))))


def checkpoint_of_all(rank: int) -> float:
    """torch.distributed.checkpoint: what two ranks write, one alone reads, and two that shard otherwise."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, plain, folder = model_of(), model_of(), _folder()
    every_block(model)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    found = []
    for shard in (None, fully_shard):
        other = model_of()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        if shard is not None:
            shard(other)
        state = {"model": get_model_state_dict(other)}
        dcp.load(state, checkpoint_id=folder, no_dist=shard is None)
        set_model_state_dict(other, state["model"])
        found.append(largest({n: whole(v) for n, v in other.state_dict().items()}, dict(plain.state_dict())))
    return on_all(max(found))


def _folder() -> str:
    """The same on all ranks."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return str(names[0])


def _of(predictions: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: value.detach() for task, value in predictions.items()}


def exported(rank: int) -> float:
    """The module that export_task gives, after a backward pass; it shares nothing with the model."""
    model, plain = model_of(timm_vit), model_of(timm_vit)
    every_block(model)
    loss_of(model(input_of(timm_vit, 0))).backward()
    single = model.export_task("depth")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.grad = None
    single, x = copy.deepcopy(single), input_of(timm_vit, 9)
    return on_all(difference(single(x), plain(x, "depth")["depth"]))


def analysed(rank: int) -> float:
    """Uneven shards of 7 batches, in which labels are missing; counts that differ."""
    data = [(input_of(Transformer, i, 2), {task: _target(i) for task in TASKS[i % 2 :]}) for i in range(7)]
    losses = dict.fromkeys(TASKS, F.mse_loss)
    model = model_of()
    want = alone(lambda: dtme.analyze(model_of(), data, losses, progress=False))
    every_block(model)
    before = {name: whole(value).clone() for name, value in model.state_dict().items()}
    found = dtme.analyze(model, data[rank::2], losses, progress=False)
    if largest({name: whole(value) for name, value in model.state_dict().items()}, before):
        return float("inf")
    return on_all(float(counts_that_differ(found, want)))


def _target(number: int) -> Tensor:
    return torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(100 + number), dtype=torch.float64)


def verified(rank: int) -> float:
    model = model_of()
    every_block(model)
    return on_all(dtme.verify(model, input_of(Transformer, rank)))


LABELS = (("semseg", "depth"), ("normals",), ("depth",), TASKS)
"""Of each rank's batch."""
FSDP2: dict[str, tuple[Callable[[int], float], float]] = {
    "every block, then the rest": (partial(trained, shard=every_block), 1e-12),
    "every block of transformers' ViT": (partial(trained, shard=every_block, backbone=transformers_vit), 1e-12),
    "the model alone": (partial(trained, shard=fully_shard), 1e-12),
    "the backbone alone": (partial(trained, shard=backbone_alone), 1e-12),
    "the backbone alone, timm's forward_features": (partial(trained, shard=backbone_alone, backbone=timm_vit), 1e-12),
    "weights stay gathered after a forward": (
        partial(trained, shard=partial(every_block, reshard_after_forward=False)),
        1e-12,
    ),
    "blocks checkpointed": (partial(trained, shard=every_block, prepare=checkpointed), 1e-12),
    "a block compiled": (partial(trained, shard=every_block, prepare=compiled), 1e-12),
    "each rank has labels of other tasks": (partial(trained, shard=heads_too, labels=LABELS), 1e-12),
    "each rank has labels of other tasks, one by one": (
        partial(trained, shard=heads_too, labels=LABELS, backbone=Mixing),
        1e-12,
    ),
    "a batch of one row on one rank": (partial(trained, shard=every_block, rows=(1, 4)), 1e-12),
    "HSDP, two replicas": (partial(trained, shard=replicated, labels=LABELS), 1e-12),
    "bfloat16 by a mixed precision policy": (mixed_precision, 3e-2),
    "three steps of Adam": (three_steps, 1e-9),
    "save_pretrained, from_pretrained": (saved, 1e-12),
    "torch.distributed.checkpoint, on one rank and otherwise sharded": (checkpoint_of_all, 0.0),
    "export_task of timm's ViT": (exported, 1e-12),
    "analyze, counts that differ": (analysed, 0.0),
    "verify": (verified, 1e-12),
}
