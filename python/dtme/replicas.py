"""Notice at once a backward pass after which DistributedDataParallel has averaged nothing."""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .torch_private import after_backward, ddp_in_forward, has_reduced
from .trees import tensors


def watch_backward(predictions: Any) -> None:
    """Let the backward pass through ``predictions`` raise where DDP goes on waiting for gradients after it.

    Plain DDP averages once every parameter has its gradient. Where one has none, as those of a task that the loss is
    not of, the gradients stay those of one rank, and only the next forward would say so, after a step was made with
    them. Where DDP looks for such parameters by itself, or nothing is to be averaged yet, there is nothing to watch.
    """
    ddp = ddp_in_forward() if torch.is_grad_enabled() else None
    if ddp is None or ddp.find_unused_parameters or ddp.static_graph or not ddp.require_backward_grad_sync:
        return
    begin = partial(_begin, weakref.ref(ddp))
    for part in tensors(predictions):
        if part.requires_grad:
            part.register_hook(begin)


def _begin(ddp: Any, gradient: Tensor) -> None:
    # DDP waits for the other ranks after the pass too: look behind that
    after_backward(partial(after_backward, partial(_check, ddp)))


def _check(ddp: Any) -> None:
    if ddp() is not None and not has_reduced(ddp()):
        raise RuntimeError(
            "DistributedDataParallel has not averaged the gradients of this backward pass, in which some parameters "
            "had none, those of tasks that this rank's loss is not of, say: let the loss be of all tasks, in one "
            "forward, or give find_unused_parameters=True, by which ranks may have different tasks: a rank without a "
            "task then counts as zero in the mean"
        )
