"""What a run on a GPU consists of, what is worth most first."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernels.__main__ import PYTEST

REPORTS = ("covariance", "conflicts", "modulation", "attention")
MODELS = ("analyze", "training", "inference")
KERNELS = Path("benchmarks/kernels")
MAIN = "^ViT-B, 512 px$"
OTHERS = ("--shapes", "^ViT-(L, 512|B, 224) px$", "--rivals", "^(ours|GEMM|copy|addmm|no task keys.*)$")
COMPILED = "compiled|merged|library"  # rivals that torch.compile has to make, which takes longer than to time them
AS_THEY_ARE = f"^(?!.*({COMPILED}))"


class Stage(NamedTuple):
    """One step, a process of its own. What it is worth is its place in ``STAGES``."""

    name: str
    command: tuple[str, ...]
    seconds: float
    """Estimated for a machine of 16 cores with an H100, compiling our kernels not counted: start of Python and torch
    (about 10), inputs, checks, what torch.compile makes of the rivals, and times."""
    most: float
    """After so many seconds it is ended, whatever the budget."""
    parallel: bool = False
    """Whether its kernels are compiled side by side."""


def python(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", *arguments


def reports(*names: str, options: tuple[str, ...]) -> tuple[str, ...]:
    """The speed reports, run by pytest in one process: a crash of one is what the next run goes on behind."""
    return python("pytest", *PYTEST, "-p", "no:cacheprovider", *options, *(f"{KERNELS}/bench_{x}.py" for x in names))


def stages() -> list[Stage]:
    """In the order of their value."""
    workers = max(1, min(14, (os.cpu_count() or 1) - 2))
    main = ("--resume", "--shapes", MAIN)
    smoke = python("pytest", "-q", "-n", str(workers), "-p", "no:cacheprovider", "tests/gpu/test_smoke.py")
    return [
        Stage("ceilings", python("benchmarks.gpu.ceilings"), 15, 75),
        Stage("smoke", smoke, 45, 120, parallel=True),
        Stage("report", reports(*REPORTS, options=(*main, "--rivals", AS_THEY_ARE)), 30, 90),
        Stage("models", reports(*MODELS, options=(*main, "--rivals", AS_THEY_ARE)), 35, 90),
        Stage("compiled", reports(*REPORTS, options=(*main, "--rivals", f"{COMPILED}|^ours$")), 60, 120),
        Stage("other sizes", reports(*REPORTS, options=("--resume", *OTHERS)), 30, 60),
        *(Stage(f"ncu {name}", python("benchmarks.gpu.ncu", name), 20, 45) for name in REPORTS),
        *(Stage(f"sweep {name}", reports(name, options=(*main, "--sweep")), 20, 90) for name in REPORTS),
        Stage("compiled models", reports(*MODELS, options=(*main, "--rivals", f"{COMPILED}|^ours$")), 120, 240),
    ]
