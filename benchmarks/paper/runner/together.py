"""The processes that torchrun started, which train one model: each on its part of every batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn


@contextmanager
def joined(device: str) -> Iterator[str]:
    """The group of all processes; yields this one's device."""
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def in_any_process(is_so: bool) -> bool:
    """Whether it is so in one of the processes; every one of them has to ask."""
    if rank_and_world()[1] == 1:
        return is_so
    answers = [False] * rank_and_world()[1]
    dist.all_gather_object(answers, is_so)
    return any(answers)


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Over the processes of a group, in buckets of one dtype; nothing to do for one process."""
    _, world = rank_and_world()
    if world == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for parameter in parameters:  # what got no gradient here may have got one there
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        some = [p for p in parameters if p.dtype == dtype]
        flat = torch.cat([p.grad.reshape(-1) for p in some])  # type: ignore[union-attr]
        dist.all_reduce(flat)
        flat /= world
        for parameter, gradient in zip(some, flat.split([p.numel() for p in some]), strict=True):
            parameter.grad = gradient.view_as(parameter).clone()


def share_buffers(model: nn.Module) -> None:
    """Rank 0's for all: the statistics of batch norms, which every process keeps of its own part of the batches."""
    if rank_and_world()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
