"""``python -m benchmarks.kernels``: time every operation against its rivals on this device, and show who is how fast.

Writes ``benchmarks/results/<device>.json`` and, with matplotlib, a picture beside it. Takes the GPU if there is one.
"""

import argparse
import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from . import lines

PYTEST = ("-q", "-o", "python_files=bench_*.py", "--benchmark-quiet")
RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("-k", default="", help="only the reports whose name matches, as in pytest")
    parser.add_argument("--cpu", action="store_true", help="the CPU's report, although there is a GPU")
    parser.add_argument("--show", type=Path, metavar="FILE", help="only print and draw this earlier .json or .jsonl")
    chosen = parser.parse_args()
    if chosen.show:
        show(chosen.show)
        return 0
    import pytest

    on_gpu = torch.cuda.is_available() and not chosen.cpu
    os.environ["DTME_BENCH_DEVICE"] = "cuda" if on_gpu else "cpu"
    path = RESULTS / f"{slug(torch.cuda.get_device_name()) if on_gpu else 'cpu'}.json"
    options = [*PYTEST, f"--benchmark-json={path}"]
    status = pytest.main([str(Path(__file__).parent), *options, *(["-k", chosen.k] if chosen.k else [])])
    if path.exists():
        show(path)
    return int(status)


def slug(device: str) -> str:
    """How its results are named."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def groups(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """{report: {rival: {"median": seconds, "p20": ..., "p80": ..., "TFLOP/s": ..., ...}}}."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    result = lines.gather(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
    for record in result["benchmarks"]:
        row = {key: record["stats"][key] for key in ("median", "p20", "p80")} | record["extra_info"]
        found.setdefault(record["group"], {})[record["params"]["rival"]] = row
    return found


def show(path: Path) -> None:
    """Print a table, ratios to ours; draw it where matplotlib is installed."""
    found = groups(path)
    print(f"\n{'':34}{'median ms':>11}{'20-80 %':>18}{'x ours':>9}{'GB/s':>8}{'TFLOP/s':>9}{'peak MB':>9}")
    for group, rivals in found.items():
        print(group)
        for rival, row in rivals.items():
            spread = f"{1e3 * row['p20']:.3f}-{1e3 * row['p80']:.3f}"
            peak = "" if row["peak MB"] is None else f"{row['peak MB']:.1f}"
            ratio = f"{row['median'] / rivals['ours']['median']:.2f}" if "ours" in rivals else ""
            numbers = f"{1e3 * row['median']:>11.3f}{spread:>18}{ratio:>9}{row['GB/s']:>8.0f}{row['TFLOP/s']:>9.2f}"
            print(f"    {rival:30}{numbers}{peak:>9}")
    if find_spec("matplotlib"):
        draw(found, path.with_suffix(".png"))
    else:
        print("\nno picture: matplotlib is not installed")


def draw(found: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """A row a report, a point a rival: how many times as long as ours."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    found = {group: rivals for group, rivals in found.items() if "ours" in rivals}
    if not found:
        return
    names = list(dict.fromkeys(rival for rivals in found.values() for rival in rivals if rival != "ours"))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.26 * len(found)), layout="constrained")
    axes.axvline(1, color="black", linewidth=1)
    for i, name in enumerate(names):
        rows = [(y, rivals) for y, rivals in enumerate(found.values()) if name in rivals]
        ratios = [rivals[name]["median"] / rivals["ours"]["median"] for _, rivals in rows]
        axes.plot(ratios, [y for y, _ in rows], "osD^"[i // 10 % 4], label=name, alpha=0.85)
    axes.set(xscale="log", xlabel="time relative to ours (right of the line: slower than ours)", ylim=(len(found), -1))
    axes.set_yticks(range(len(found)), found)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    device = next(iter(next(iter(found.values())).values()))["device"]
    axes.set_title(f"{device}: medians of interleaved runs from cold caches")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=130)
    print(f"\n{path}")


if __name__ == "__main__":
    sys.exit(main())
