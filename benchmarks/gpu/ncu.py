"""``python -m benchmarks.gpu.ncu REPORT``: what limits the kernels of one report, by NVIDIA's profiler."""

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.kernels import lines
from benchmarks.kernels.device import RECORDING

from .stages import MAIN, reports

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats")


def main(report: str) -> int:
    program = reports(report, options=("--shapes", MAIN, "--rivals", "^ours$", "--once"))
    if RECORDING:
        return subprocess.run(program).returncode
    profiler = shutil.which("ncu")
    if profiler is None:
        lines.write("ncu", report=report, error="ncu is not installed")
        return 0
    options = [option for section in SECTIONS for option in ("--section", section)]
    # the clocks stay as they are; nothing is profiled before the program asks for it
    options += ["--clock-control", "none", "--profile-from-start", "off", "--csv"]
    with subprocess.Popen([profiler, *options, *program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        count = 0
        for kernel in kernels(process.stdout):
            lines.write("ncu", report=report, **kernel)
            count += 1
    if not count:
        lines.write("ncu", report=report, error=f"ncu profiled nothing (status {process.returncode})")
    return process.returncode


def kernels(output: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Every kernel launch of ncu's CSV, which stands behind what the program prints, once its last row is there."""
    names: list[str] = []
    current: dict[str, Any] = {}
    for text in output:
        if not text.startswith('"'):
            continue
        row = next(csv.reader([text]))
        if row[0] == "ID":
            names = row
            continue
        cells = dict(zip(names, row, strict=False))
        if cells.get("ID") != current.get("id"):
            if current:
                yield current
            current = {"id": cells.get("ID"), "kernel": cells.get("Kernel Name"), "metrics": {}}
        if cells.get("Metric Name"):
            unit = f" [{cells['Metric Unit']}]" if cells["Metric Unit"] else ""
            current["metrics"][cells["Metric Name"] + unit] = number(cells["Metric Value"])
    if current:
        yield current


def number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
