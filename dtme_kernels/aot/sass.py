"""What a compiled kernel is made of: resources, spills, barriers, and the instructions of one step of its main loop."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

PRODUCTS = re.compile(r"\b(?:HGMMA|HMMA|IMMA|QGMMA|UTC\w*MMA)\b")
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?(0x[0-9a-f]+)")


class Code(NamedTuple):
    """Of one kernel's machine code."""

    instructions: int
    spills: int
    """Instructions that save a register in local memory or bring it back."""
    barriers: int
    """Instructions that wait for all warps of a program."""
    step: int
    """Instructions of the innermost loop with the most matrix products, or of the longest where none has any."""
    products: int
    """Matrix instructions in that loop."""


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: a kernel without one spills nothing."""
    text = _disassemble(cubin, "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return registers, stack + local


def read(cubin: bytes) -> Code:
    lines = [(int(address, 16), text) for address, text in LINE.findall(_disassemble(cubin, "--dump-sass"))]
    loops = []
    for address, text in lines:
        if (branch := BRANCH.search(text)) and (target := int(branch[1], 16)) < address:
            loops.append((target, address))
    found = []
    for first, last in loops:
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops):
            body = [text for address, text in lines if first <= address <= last]
            found.append((sum(bool(PRODUCTS.search(text)) for text in body), len(body)))
    products, step = max(found, default=(0, 0))

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for _, text in lines)

    return Code(len(lines), count(r"\b(?:STL|LDL)\b"), count(r"\bBAR\.(?:SYNC|RED)"), step, products)


def _disassemble(cubin: bytes, what: str) -> str:
    """By the program that comes with Triton."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(program), what, file.name], check=True, capture_output=True, text=True).stdout
