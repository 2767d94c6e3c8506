"""Compile every kernel, as launched for real shapes, for chips that need not be here: what did the compiler make of it?

The launchers themselves run, on tensors without storage, and every launch ends after its compilation. So what is looked
at is what ships: tiles, warps, stages, alignment, and the constants of each shape.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, NamedTuple

import torch

from .. import launch
from . import sass
from .cases import cases, precisions

CHIPS = {chip.capability: chip for chip in launch.CHIPS}
# Triton writes the same code for sm_89 as for sm_86, and for sm_80 but for the order of instructions. The assembler,
# which allots the registers, tells them apart
SIBLINGS = {89: 86}
NEARLY_SIBLINGS = SIBLINGS | {80: 86}
DOTS = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma"}


class Compiled(NamedTuple):
    """One kernel of one launch, for one architecture."""

    case: str
    kernel: str
    capability: int
    warps: int
    registers: int
    """Of a thread; 255 are the most."""
    spills: int
    """Instructions that save a register in local memory or bring it back."""
    shared: int
    """Bytes per program."""
    product: str
    """What multiplies matrices: ``wgmma``, ``mma``, ``tcgen05``, or ``fma`` on no tensor core; else empty."""
    trap: bool
    """Whether the compiler gave up on part of the kernel, which would end the process that reaches it."""
    cubin: bytes


def compile_cases(
    capability: int,
    only: str | tuple[str, ...] = "",
    *,
    share: tuple[int, int] = (0, 1),
    siblings: dict[int, int] = SIBLINGS,
) -> Iterator[Compiled]:
    """Compile what the cases launch; a kernel that several launch has the first one's name.

    Float32 is compiled as ``torch.set_float32_matmul_precision`` "highest" and "high" have it.

    Args:
        capability: of a chip in ``CHIPS``, ten times its major number plus its minor one.
        only: the cases with this in their name, or, of a tuple, those whose name begins with one.
        share: ``(i, n)``: every n-th of these cases only, from the i-th on, for n processes to do all of them.
        siblings: chips to take the code of another one for, and only to assemble it.
    """
    chosen = []
    for precision in ("highest", "high"):
        for name, run in cases().items():
            wanted = name.startswith(only) if isinstance(only, tuple) else only in name
            if wanted and precision in precisions(name):
                chosen.append((precision, name, run))
    seen: set[str] = set()
    if share[1] > 1:  # neighbours are alike, and would go to different shares: forward to one, backward to the other
        chosen.sort(key=lambda case: sha256(case[1].encode()).digest())
    for precision, name, run in chosen[share[0] :: share[1]]:
        with _compiling(capability, siblings.get(capability, capability), precision) as compiled:
            run()
        for kernel in compiled:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                yield _inspect(f"{name}{', tf32' * (precision == 'high')}", capability, kernel)


@contextmanager
def _compiling(capability: int, target: int, precision: str) -> Iterator[list[Any]]:
    """Yield the kernels that are launched inside as on the one chip: compiled for the other, and not run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Compiler:
        """What JITFunction.run asks of a driver before it launches."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", target, 32)

        def get_current_device(self) -> str:
            return f"sm_{capability}"  # a key of Triton's cache of compiled kernels

        def get_current_stream(self, device: str) -> int:
            return 0

    compiled: list[Any] = []
    run, chip, active = JITFunction.run, launch._without_a_gpu, driver._active
    before = torch.get_float32_matmul_precision()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    try:
        torch.set_float32_matmul_precision(precision)
        driver.set_active(Compiler())
        JITFunction.run = compile_only
        launch._without_a_gpu = CHIPS[capability]
        yield compiled
    finally:
        torch.set_float32_matmul_precision(before)
        JITFunction.run, launch._without_a_gpu = run, chip
        driver._active = active


def _inspect(case: str, capability: int, kernel: Any) -> Compiled:
    ptx, metadata = kernel.asm["ptx"], kernel.metadata
    cubin = kernel.asm["cubin"] if metadata.target.arch == capability else _assemble(kernel, capability)
    registers, stack = sass.resources(cubin)
    product = ""
    if "tt.dot " in kernel.asm["ttir"]:
        product = next((short for long, short in DOTS.items() if long in ptx), "fma")
    return Compiled(
        case,
        kernel.src.name.lstrip("_"),
        capability,
        metadata.num_warps,
        registers,
        sass.read(cubin).spills if stack else 0,  # a stack may be there and not be used
        metadata.shared,
        product,
        "trap;" in ptx,
        cubin,
    )


def _assemble(kernel: Any, capability: int) -> bytes:
    """The code of ``kernel`` for another chip of its family."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", capability, 32))
    ptx = re.sub(r"(?m)^\.target sm_\d+", f".target sm_{capability}", kernel.asm["ptx"])
    return backend.make_cubin(ptx, kernel.metadata._asdict(), kernel.metadata, capability)


def table(capabilities: Sequence[int], only: str = "") -> Iterator[str]:
    """Lines for ``python -m dtme_kernels.info --aot``, each as soon as its kernel is compiled."""
    yield (
        f"{'':52}{'kernel':20}{'chip':8}{'warps':>5}{'registers':>11}{'spills':>9}{'shared KB':>11}"
        f"{'instructions':>14}{'barriers':>10}{'step':>7}{'products':>10}  product"
    )
    for capability in capabilities:
        for row in compile_cases(capability, only):
            code, chip, shared = sass.read(row.cubin), f"sm_{row.capability}", row.shared / 1024
            numbers = f"{row.warps:>5}{row.registers:>11}{row.spills:>9}{shared:>11.1f}"
            numbers += f"{code.instructions:>14}{code.barriers:>10}{code.step:>7}{code.products:>10}"
            yield f"{row.case:52}{row.kernel:20}{chip:8}{numbers}  {row.product or '-'}{' TRAP' * row.trap}"
