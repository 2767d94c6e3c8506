"""What every Triton launcher asks: may it run here, on which device, over which rows. Imports torch only."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class Chip(NamedTuple):
    """What a launch depends on: the generation, the programs side by side, the shared memory that one may take."""

    capability: int
    multiprocessors: int
    shared_memory: int

    @property
    def product(self) -> str:
        """The instruction that Triton multiplies matrices with, by which tiles are chosen."""
        return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(self.capability // 10, "mma")


# A100, RTX A6000, RTX 4090, H200, B200, RTX 5090: one of every generation
CHIPS = (
    Chip(80, 108, 163 * 1024),
    Chip(86, 84, 99 * 1024),
    Chip(89, 128, 99 * 1024),
    Chip(90, 132, 227 * 1024),
    Chip(100, 148, 227 * 1024),
    Chip(120, 170, 99 * 1024),
)
_without_a_gpu = CHIPS[3]  # for the interpreter; aot compiles for all of them


def chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return _without_a_gpu
    found = torch.cuda.get_device_properties(device)
    shared_memory = getattr(found, "shared_memory_per_block_optin", 99 * 1024)  # what every chip since 2020 has
    return Chip(10 * found.major + found.minor, found.multi_processor_count, shared_memory)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, in NumPy on the CPU. Triton reads the variable when imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def highest() -> bool:
    """Whether float32 is to be multiplied as float32 (on tensor cores: in three parts), as torch has been told."""
    return torch.get_float32_matmul_precision() == "highest"


def cannot_run(*tensors: Tensor) -> str | None:
    """Why Triton kernels cannot run on these tensors, or None where they can."""
    if any(x.dtype == torch.float64 for x in tensors):
        return "the kernels compute in float32; float64 is the reference's"
    device = tensors[0].device.type
    if device != ("cpu" if interpreted() else "cuda"):
        return f"Triton kernels run on CUDA tensors (on the CPU with TRITON_INTERPRET=1), got {device} tensors"
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def collapse(tensor: Tensor, keep: int = 0) -> Tensor:
    """(*kept, ..., p) -> (*kept, outer, inner, p): a view where two strides can address all tokens, else a copy.

    Also a copy where the channels of one token lie further apart than 32 bits count.

    Kernels then find a token at ``(i // inner) * stride_outer + (i % inner) * stride_inner``.
    """
    *sizes, p = tensor.shape[keep:]
    merged = [(1, 0)]
    for size, stride in zip(sizes, tensor.stride()[keep:-1], strict=True):
        if size == 1:
            continue
        last_size, last_stride = merged[-1]
        if last_size == 1:
            merged[-1] = (size, stride)
        elif last_stride == size * stride:
            merged[-1] = (last_size * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2 or (p - 1) * tensor.stride(-1) >= 2**31:
        return collapse(tensor.contiguous(), keep)
    outer, inner = merged if len(merged) == 2 else [(1, 0), *merged]
    shape = (*tensor.shape[:keep], outer[0], inner[0], p)
    strides = (*tensor.stride()[:keep], outer[1], inner[1], tensor.stride(-1))
    return tensor.as_strided(shape, strides)


def in_reach(matrix: Tensor) -> Tensor:
    """The matrix, or a copy where 32 bits cannot count from its first to its last element."""
    return (
        matrix
        if sum(n * s for n, s in zip(matrix.shape, matrix.stride(), strict=True)) < 2**31
        else matrix.contiguous()
    )
