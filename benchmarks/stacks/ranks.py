"""Run a function in several processes that talk to each other by gloo."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(function: Callable[..., Any], world: int, *args: Any, seconds: int = 60) -> list[Any]:
    """``function(rank, *args)`` in each of ``world`` fresh processes, one thread each; what every rank returns.

    Args:
        function: at the top of a module, so that a fresh process can import it.
        seconds: after which a rank that waits for another gives up.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (function, world, folder, seconds, args), world)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _run(rank: int, function: Callable[..., Any], world: int, folder: str, seconds: int, args: Any) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    torch.save(function(rank, *args), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # at the interpreter's end a thread of gloo's may abort a process that has done its work
