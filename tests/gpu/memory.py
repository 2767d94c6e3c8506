"""How much memory a call takes."""

from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that a call asks for beyond what there is, in bytes as asked for: the allocator rounds them up."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = call()
    torch.cuda.synchronize()
    most = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    del result
    return most - before
