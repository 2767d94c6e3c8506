"""``python -m dtme_kernels.info``: versions, devices, and what every operation runs on here.

With ``--aot``, what the compiler makes of every Triton kernel, for chips that need not be here.
"""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import dtme_kernels

from . import registry
from .extension import is_as_built
from .registry import OPERATORS


def report() -> str:
    """Versions and devices; for each operation what ``auto`` takes on CPU and CUDA, and why a kernel is missing."""
    reasons: list[str] = []

    def missing(name: str) -> str:
        notes = []
        for impl in ("triton", "cpp"):
            if why := OPERATORS[name].missing(impl):
                if why not in reasons:
                    reasons.append(why)
                notes.append(f"{impl} [{reasons.index(why) + 1}]")
        return ", ".join(notes) or "-"

    names = [name for name in OPERATORS if not name.endswith("_backward")]
    rows = [("operation", "auto on CPU", "auto on CUDA", "missing")]
    rows += [
        (name, OPERATORS[name].automatic("cpu"), OPERATORS[name].automatic("cuda"), missing(name)) for name in names
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"[{i}] {why}" for i, why in enumerate(reasons, 1)]
    return "\n".join([*_versions(), "", *table, "", *notes])


def _versions() -> list[str]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        f"dtme_kernels {dtme_kernels.__version__}",
        f"torch        {torch.__version__}",
        f"triton       {triton_version()}",
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"cpu          {torch.get_num_threads()} threads",
        f"c++          {extension()}",
        f"cuda         {', '.join(devices) or 'no device'}",
    ]


def extension() -> str:
    """Whose C++ kernels run, and how they were built."""
    module = registry.cpp_module
    if module is None:
        return "no extension"
    facts = module.build_facts()
    intact = is_as_built(Path(module.__file__)) is not False
    damage = "" if intact else "; DAMAGED, it is not what was built: reinstall"
    sets = f"{module.instruction_set()} kernels (of {', '.join(module.instruction_sets())})"
    return f"{sets}, {facts['compiler']} {facts['flags']}, for torch {facts['torch_target']} and later{damage}"


def triton_version() -> str:
    """Without importing Triton."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dtme_kernels.info", description=__doc__)
    parser.add_argument(
        "--aot",
        nargs="*",
        type=int,
        metavar="CAPABILITY",
        help="compile every Triton kernel, as launched, for these compute capabilities (of 80 86 89 90 100 120)",
    )
    parser.add_argument("--only", default="", metavar="NAME", help="with --aot, the cases with this in their name")
    options = parser.parse_args()
    chosen = options.aot
    if chosen is None:
        print(report())
        return
    if why := OPERATORS["count_conflicts"].missing("triton"):
        parser.error(f"nothing to compile: {why}")
    from .aot import CHIPS, table

    if unknown := set(chosen) - CHIPS.keys():
        parser.error(f"capabilities must be of {list(CHIPS)}, got {sorted(unknown)}")
    for line in table(chosen or list(CHIPS), options.only):
        print(line, flush=True)


if __name__ == "__main__":
    main()
