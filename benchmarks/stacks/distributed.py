"""Several processes: DDP, tensor parallel, and analyses of shards."""

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import dtme

from .processes import (
    TASKS,
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
    transformers_vit,
)
from .ranks import run_ranks
from .sharded import FSDP2
from .situation import largest, situation

Backbone = Callable[[], nn.Module]
SPLIT = (("depth",), ("semseg", "normals"))
"""Tasks of each rank."""


# --- DDP --------------------------------------------------------------------------------------------------------------


def trained(rank: int, *, backbone: Backbone = Transformer, tasks: Any = (TASKS, TASKS), **options: Any) -> float:
    """Gradients after each of three steps, of ranks with data, and tasks, of their own."""
    model = model_of(backbone)
    wrapped = nn.parallel.DistributedDataParallel(model, **options)
    found = 0.0
    for step in range(3):
        losses = [
            partial(lambda i, step, net: loss_of(net(input_of(backbone, 2 * step + i), tasks[i])), i, step)
            for i in range(2)
        ]
        wrapped.zero_grad()
        losses[rank](wrapped).backward()
        found = max(found, largest_difference(gradients(model), mean_gradients(model_of(backbone), losses)))
    return on_all(found)


def labels_differ(rank: int) -> float:
    """All tasks run, and each rank's loss is of some: DDP has to look for what was not used."""
    model = model_of()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    losses = [partial(lambda i, net: loss_of(labelled(net(input_of(Transformer, i)), SPLIT[i])), i) for i in range(2)]
    want, found = mean_gradients(model_of(), losses), 0.0
    for _ in range(2):
        wrapped.zero_grad()
        losses[rank](wrapped).backward()
        found = max(found, largest_difference(gradients(model), want))
    return on_all(found)


def accumulated(rank: int) -> float:
    """Two batches a step, the first in no_sync."""
    model = model_of()
    wrapped = nn.parallel.DistributedDataParallel(model)
    losses = [partial(lambda i, net: loss_of(net(input_of(Transformer, i))), i) for i in range(4)]
    want, found = mean_gradients(model_of(), losses), 0.0
    for _ in range(2):
        wrapped.zero_grad()
        for i in range(2):
            with wrapped.no_sync() if i == 0 else nullcontext():
                (losses[2 * i + rank](wrapped) / 2).backward()
        found = max(found, largest_difference(gradients(model), want))
    return on_all(found)


# --- tensor parallel --------------------------------------------------------------------------------------------------


def tensor_parallel(rank: int, backbone: Backbone, names: Sequence[str]) -> float:
    """Heads and hidden units of each block among the ranks: predictions and gradients, in training and not.

    Args:
        names: of query, key, value, output, and the two linear layers of an MLP, in a block.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, plain = model_of(backbone), model_of(backbone)
    mesh = init_device_mesh("cpu", (2,))
    *columns, out, up, down = names
    for block in blocks_of(model).values():
        styles = {name: ColwiseParallel() for name in (*columns, up)}
        parallelize_module(block, mesh, {**styles, out: RowwiseParallel(), down: RowwiseParallel()})
    x, found = input_of(backbone, 0), 0.0
    for training in (True, False):
        ours, want = model.train(training)(x), plain.train(training)(x)
        found = max(found, largest(ours, want))
        model.zero_grad()
        plain.zero_grad()
        loss_of(ours).backward()
        loss_of(want).backward()
        found = max(found, largest_difference(gradients(model), gradients(plain)))
    return on_all(found)


OWN = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.0", "mlp.2")
VIT = (*(f"attention.{name}_proj" for name in "qkvo"), "mlp.fc1", "mlp.fc2")


# --- analyses ---------------------------------------------------------------------------------------------------------


def targets_of(number: int, rows: int, tasks: Sequence[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    some = {task: torch.randn(rows, 5, 2, generator=generator, dtype=torch.float64) for task in TASKS}
    return {task: some[task] for task in tasks}


def batches(count: int, tasks: Callable[[int], Sequence[str]] = lambda i: TASKS) -> list[Any]:
    """Of one to three rows each."""
    sizes = [1 + i % 3 for i in range(count)]
    return [(input_of(Transformer, i, n), targets_of(i, n, tasks(i))) for i, n in enumerate(sizes)]


LOSSES = dict.fromkeys(TASKS, F.mse_loss)


def analysed(rank: int, data: list[Any], make: Callable[[], Any] = model_of, **options: Any) -> float:
    """Every second batch on each rank, against all of them in one process; counts that differ."""
    options = {"losses": LOSSES, "progress": False} | options
    found = dtme.analyze(make(), data[rank::2], **options)
    # in the order in which two ranks read them together
    return on_all(float(counts_that_differ(found, alone(lambda: dtme.analyze(make(), data, **options)))))


def in_groups() -> Any:
    """Two of the tasks in one stream."""
    model = model_of(is_expanded=False)
    first, second, third = blocks_of(model)
    plan = dtme.ExpansionPlan(
        TASKS, 2, {first: TASKS, third: ("normals",)}, {second: TASKS}, groups={"maps": ("semseg", "depth")}
    )
    dtme.expand(model, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dtme." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def masked(batch: Any) -> Tensor:
    """The first tokens of each row count, as many as its own first number says."""
    x = batch[0]
    lengths = 2 + (x[:, 0, 0] > 0).long() + (x[:, 0, 1] > 0).long()
    return torch.arange(x.shape[1]) < lengths[:, None]


def by_step(model: Any, batch: Any) -> dict[str, Any]:
    """A loop of somebody's own, which has a loss only of the tasks that a batch has labels of."""
    found = model(batch[0])
    return {task: F.mse_loss(found[task], batch[1][task]) if task in batch[1] else 0.0 for task in TASKS}


def settled(rank: int) -> float:
    """Both ranks stop at the same look, with the plan that both have; batches that only one has counted."""
    data = batches(40)
    found = dtme.analyze(model_of(), data[rank::2], LOSSES, settle=0.6, plan_options={"expansion": 0.0}, progress=False)
    every: list[Any] = [None, None]
    dist.all_gather_object(every, (found.num_batches, found.settled, found.range_counts.tolist()))
    read = found.num_batches or 0
    want = alone(lambda: dtme.analyze(model_of(), data[:read], LOSSES, progress=False))
    wrong = int((found.valid_counts != want.valid_counts).sum()) + (every[0] != every[1])
    return on_all(float(wrong + (not found.settled) + (read >= len(data))))


def subsets(i: int) -> Sequence[str]:
    """Labels of one task, of two, or of all."""
    return (TASKS, TASKS[:2], TASKS[1:], TASKS[2:])[i % 4]


DDP: dict[str, tuple[Callable[[int], float], float]] = {
    "plain": (trained, 1e-12),
    "static_graph": (partial(trained, static_graph=True), 1e-12),
    "find_unused_parameters": (partial(trained, find_unused_parameters=True), 1e-12),
    "gradient_as_bucket_view": (partial(trained, gradient_as_bucket_view=True), 1e-12),
    "no_sync accumulation": (accumulated, 1e-12),
    "tasks one by one": (partial(trained, backbone=Mixing), 1e-12),
    "other tasks on each rank, find_unused_parameters": (
        partial(trained, tasks=SPLIT, find_unused_parameters=True),
        1e-12,
    ),
    "other tasks on each rank, static_graph": (partial(trained, tasks=SPLIT, static_graph=True), 1e-12),
    "labels of other tasks on each rank, find_unused_parameters": (labels_differ, 1e-12),
}
TENSOR_PARALLEL: dict[str, tuple[Callable[[int], float], float]] = {
    "own blocks": (partial(tensor_parallel, backbone=Transformer, names=OWN), 1e-12),
    "transformers' ViT": (partial(tensor_parallel, backbone=transformers_vit, names=VIT), 1e-12),
}
ANALYSES: dict[str, tuple[Callable[[int], float], float]] = {
    "uneven shards, a plain model": (
        lambda rank: analysed(rank, batches(13), partial(model_of, is_expanded=False)),
        0.0,
    ),
    "subsets of tasks in each batch, expanded": (lambda rank: analysed(rank, batches(13, subsets)), 0.0),
    "subsets of tasks in a loop of one's own": (
        lambda rank: analysed(rank, batches(9, subsets), losses=by_step),
        0.0,
    ),
    "token masks": (lambda rank: analysed(rank, batches(7), token_mask=masked), 0.0),
    "groups of tasks": (lambda rank: analysed(rank, batches(7), in_groups), 0.0),
    "two ratios, streamed": (lambda rank: analysed(rank, batches(5), method="streamed", ratio=(100.0, 10.0)), 0.0),
    "settled": (settled, 0.0),
}
STACKS = {"FSDP2": FSDP2, "DDP": DDP, "tensor parallel": TENSOR_PARALLEL, "analyze on two ranks": ANALYSES}


def work(rank: int) -> dict[tuple[str, str], float | str]:
    """All rows in one pair of processes: starting them takes longer than any row."""
    warnings.simplefilter("ignore")
    found: dict[tuple[str, str], float | str] = {}
    for stack, rows in STACKS.items():
        for name, (measure, _) in rows.items():
            if not all(map(find_spec, needs_of(name))):
                continue
            try:
                found[stack, name] = measure(rank)
            except Exception as error:  # a row of the table
                found[stack, name] = f"{type(error).__name__}: {error}"
    return found


@functools.cache
def measured() -> dict[tuple[str, str], float | str]:
    return run_ranks(work, 2)[0]


def needs_of(name: str) -> tuple[str, ...]:
    return tuple(library for library in ("timm", "transformers") if f"{library}'s" in name)


def of_row(stack: str, name: str) -> float:
    value = measured()[stack, name]
    if isinstance(value, str):
        raise RuntimeError(value)
    return value


for _stack, _rows in STACKS.items():
    for _name, (_, _limit) in _rows.items():
        _row = situation(_stack, _name, against="one process", limit=_limit, needs=needs_of(_name), run="two ranks")
        _row(partial(of_row, _stack, _name))
